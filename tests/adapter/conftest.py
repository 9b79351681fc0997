"""A host, an adapter on it that moves its outputs, and a checkpoint folder with a processor: all tiny and random."""

import pytest
import torch
from families import FAMILIES

from tarsia.adapter import Adapter, Host, probe
from tarsia.core.attach import Part, attach, detach, patches
from tarsia.methods.full import FullConfig
from tarsia.methods.lora import LoRAConfig

PARTS = (
    Part("lora", "language.*.{q,v}", LoRAConfig(rank=3, alpha=4.0, ranks={"*.1.*": 2}, dropout=0.1)),
    Part("full", "projector", FullConfig()),
)


def trained(host, parts, name, seed=0, size=0.1):
    """Attach ``parts`` and draw every trained tensor anew, as a training would leave it."""
    attach(host.model, host.sites, parts, name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for patch in patches(host.model, name).values():
            for parameter in patch.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def host():
    return Host.of(FAMILIES["llava"].build()[0])


@pytest.fixture(scope="session")
def inputs():
    return FAMILIES["llava"].batch()


@pytest.fixture
def make(host, inputs):
    """An adapter of ``host``, which is left bare."""

    def make(parts=PARTS, seed=0, card=None, probed=False):
        trained(host, parts, "default", seed)
        adapter = Adapter.of(host, "default", parts, card, probe=probe(host, inputs) if probed else None)
        detach(host.model, "default")
        return adapter

    return make


@pytest.fixture
def checkpoint(tmp_path):
    """A folder that AutoModelForImageTextToText and AutoProcessor load."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    folder = tmp_path / "base"
    FAMILIES["llava"].build()[0].save_pretrained(folder)
    words = {f"w{i}": i for i in range(94)} | {"<video>": 94, "<image>": 95}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w7")),
        pad_token="w0",
        bos_token="w1",
        eos_token="w2",
        additional_special_tokens=["<image>"],
    )
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    LlavaProcessor(pictures, tokenizer, patch_size=4, chat_template=template).save_pretrained(folder)
    return folder
