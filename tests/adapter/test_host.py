"""A base is opened whole or refused with what to do; its fingerprint changes with it and with nothing else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tarsia.adapter import Fingerprint, Host, native_bf16, open_base, open_outline
from tarsia.base import NAMES, resolve
from tarsia.core.attach import Part, attach
from tarsia.core.errors import AdapterError, AnatomyError, BaseMismatch, ConfigError
from tarsia.methods.lora import LoRAConfig


def test_a_folder(checkpoint):
    host = open_base(str(checkpoint))
    assert (host.name, host.path) == (str(checkpoint), checkpoint)
    assert not host.model.training
    assert host.processor.image_processor is not None
    assert host.sites == tuple(host.anatomy.sites(host.model))
    assert next(host.model.parameters()).dtype == torch.float32
    assert host.fingerprint.weights.startswith("files:")


def test_precision(checkpoint, monkeypatch):
    from tarsia.adapter import host as module

    half = open_base(str(checkpoint), dtype="bfloat16", processor=False)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(module, "native_bf16", lambda place, native=native: native and place.type == "cpu")
        opened = open_base(str(checkpoint), dtype="auto", processor=False)
        assert next(opened.model.parameters()).dtype == expected
        assert opened.fingerprint == half.fingerprint  # whatever it is loaded in


def test_native_bf16_reads_the_processor(monkeypatch):
    from pathlib import Path

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for text, expected in (("flags : fpu avx512f\n", False), ("flags : fpu avx512_bf16\n", True), ("amx_bf16", True)):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text, **_: text)
        assert native_bf16() is expected

    def missing(self, **_):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert native_bf16() is False


def test_native_bf16_is_that_of_the_device(monkeypatch):
    """A GPU beside it lends the processor nothing."""
    from pathlib import Path

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "flags : fpu avx512f")
    assert native_bf16()
    assert native_bf16(torch.device("cuda"))
    assert not native_bf16(torch.device("cpu"))


def edit(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "name, match", [("./nowhere", "no such model"), ("/no/where", "no such model"), ("mini-9", "no such model")]
)
def test_no_such_model(name, match):
    with pytest.raises(ConfigError, match=match):
        open_base(name)


def test_an_id_that_the_hub_does_not_give(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*_, **__):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match="nor to be had from the hub"):
        open_base("someone/something")


def test_a_hub_id_is_a_folder_of_the_cache(checkpoint, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(checkpoint))
    assert open_base("someone/llava", processor=False).path == checkpoint


def test_a_family_that_is_not_known_is_refused_before_its_weights_are_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, *, allow_patterns, **_):
        asked.extend(allow_patterns)
        return str(tmp_path)

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kosmos-2", "vision_config": {}}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(AnatomyError, match="kosmos-2"):
        open_base("someone/kosmos")
    assert asked == ["config.json"]


def test_a_base_that_is_quantised_in_another_way(checkpoint):
    edit(
        checkpoint / "config.json",
        lambda c: c.update(quantization_config={"quant_method": "aqlm", "nbits_per_codebook": 16}),
    )
    with pytest.raises(AdapterError, match="not read here"):
        open_base(str(checkpoint), processor=False)


def test_options_that_make_no_sense(checkpoint):
    with pytest.raises(ConfigError, match="precision"):
        open_base(str(checkpoint), dtype="float8")
    with pytest.raises(ConfigError, match="device"):
        open_base(str(checkpoint), device="cuda:99")
    with pytest.raises(ConfigError, match="device"):
        open_base(str(checkpoint), device="abacus")


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ConfigError, match="no model"):
        open_base(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="an adapter"):
        open_base(str(tmp_path))


def test_a_text_only_model(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(AnatomyError, match="no vision-language model"):
        open_base(str(tmp_path))


@pytest.mark.parametrize("names", [["preprocessor_config.json", "processor_config.json"], ["tokenizer.json"]])
def test_a_processor_that_is_not_whole(checkpoint, names):
    for name in names:
        (checkpoint / name).unlink(missing_ok=True)
    with pytest.raises(AdapterError, match="processor"):
        open_base(str(checkpoint))
    open_base(str(checkpoint), processor=False)


def test_a_processor_that_needs_another_library(checkpoint, monkeypatch):
    def refuse(*args, **options):
        raise ImportError("\nSomeVideoProcessor requires the Torchvision library but it was not found. Check out ...")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", refuse)
    with pytest.raises(AdapterError, match="library that is not installed") as caught:
        open_base(str(checkpoint))
    assert "SomeVideoProcessor requires the Torchvision library" in str(caught.value)
    assert "pip" in str(caught.value)


def test_weights_that_are_not_whole(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(AdapterError, match="truncated"):
        open_base(str(checkpoint))
    save_file({k: v for k, v in tensors.items() if "linear_1" not in k}, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="random numbers"):
        open_base(str(checkpoint))
    path.unlink()
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    with pytest.raises(AdapterError, match="no safetensors"):
        open_base(str(checkpoint))


def test_a_broken_configuration(checkpoint):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"config\.json"):
        open_base(str(checkpoint))


def test_an_outline_has_no_weights_and_a_processor_where_it_is_wanted(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    base = open_outline(str(checkpoint))
    assert base.processor is not None
    assert all(p.is_meta for p in base.model.parameters())
    (checkpoint / "processor_config.json").unlink()
    assert open_outline(str(checkpoint), processor=False).sites == base.sites


@pytest.mark.parametrize("field, value", [("hidden_act", "wave"), ("num_channels", -1)])
def test_a_configuration_that_no_model_can_be_built_of(checkpoint, field, value):
    edit(checkpoint / "config.json", lambda fields: fields["vision_config"].update({field: value}))
    with pytest.raises(AnatomyError, match="can not build a model") as caught:
        open_outline(str(checkpoint))
    assert str(checkpoint) in str(caught.value)


def test_a_configuration_that_divides_by_nought(checkpoint):
    edit(checkpoint / "config.json", lambda fields: fields["vision_config"].update(num_attention_heads=0))
    with pytest.raises(AnatomyError, match="can not read this configuration"):
        open_outline(str(checkpoint))


def test_embedded_names(monkeypatch, tmp_path):
    assert resolve("someone/model") == "someone/model"
    assert resolve("./folder") == "./folder"
    import tarsia.base as base

    monkeypatch.setattr(base, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        with pytest.raises(ConfigError, match="not in this installation"):
            resolve(name)
        (tmp_path / name).mkdir()
        monkeypatch.chdir("/")
        with pytest.raises(ConfigError, match="not in this installation"):
            resolve(name)
        (tmp_path / name / "config.json").write_text("{}")
        assert resolve(name) == str(tmp_path / name)


# Fingerprints.


@pytest.fixture
def print_(checkpoint):
    return Fingerprint.of_folder(checkpoint)


def differing(one, other):
    return [name for name in one.__slots__ if getattr(one, name) != getattr(other, name)]


def test_it_does_not_depend_on_sharding(checkpoint, print_, tmp_path):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    for path in (tmp_path / "sharded").iterdir():
        shutil.copy(path, checkpoint)
    (checkpoint / "model.safetensors").unlink()
    assert (checkpoint / "model.safetensors.index.json").exists()
    assert differing(print_, Fingerprint.of_folder(checkpoint)) == []


def test_it_does_not_depend_on_order_or_metadata(checkpoint, print_):
    """The same tensors, listed the other way round (safetensors itself would sort them)."""
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    turned = json.dumps(dict(reversed(table.items())) | {"__metadata__": {"format": "pt", "note": "x"}}).encode()
    path.write_bytes(len(turned).to_bytes(8, "little") + turned + content[8 + length :])
    assert differing(print_, Fingerprint.of_folder(checkpoint)) == []


def change_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    first = tensors[min(tensors)]
    first.view(torch.uint8).flatten()[0] ^= 1  # one bit
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rename_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    a, b = [k for k in sorted(tensors) if "q_proj.weight" in k][:2]
    tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CHANGES = {
    "one bit": (change_weight, ["weights"]),
    "two exchanged": (rename_weights, ["weights"]),
    "another layer is read": (
        lambda f: edit(f / "config.json", lambda c: c.update(vision_feature_layer=-1)),
        ["architecture"],
    ),
    "how it was stored": (
        lambda f: edit(f / "config.json", lambda c: c.update(transformers_version="9", dtype="bfloat16")),
        [],
    ),
    "quantised": (
        lambda f: edit(f / "config.json", lambda c: c.update(quantization_config={"load_in_4bit": True})),
        ["quantisation"],
    ),
    "a vocabulary": (lambda f: edit(f / "tokenizer.json", lambda c: c["model"]["vocab"].update(w9=0)), ["processor"]),
    "pictures of another size": (
        lambda f: edit(f / "processor_config.json", lambda c: c["image_processor"].update(size=99)),
        ["processor"],
    ),
    "a chat template": (lambda f: (f / "chat_template.jinja").write_text("other"), ["template"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_seen_in_its_part_alone(checkpoint, print_, name):
    change, parts = CHANGES[name]
    change(checkpoint)
    now = Fingerprint.of_folder(checkpoint)
    assert differing(print_, now) == parts
    if not parts:
        print_.check(now)
        return
    with pytest.raises(BaseMismatch, match=parts[0]):
        print_.check(now)
    if parts[0] in ("processor", "template", "quantisation"):
        print_.check(now, allow=parts)
    else:
        with pytest.raises(ConfigError, match="can not be allowed"):
            print_.check(now, allow=parts)


def test_memory_is_never_taken_for_files(checkpoint, print_):
    host = open_base(str(checkpoint), processor=False)
    with pytest.raises(BaseMismatch, match="built in memory"):
        print_.check(Host.of(host.model).fingerprint)


def test_in_memory_it_sees_the_base_alone(host):
    before = host.fingerprint
    attach(host.model, host.sites, [Part("lora", "language", LoRAConfig(rank=2))])
    assert Fingerprint.of_model(host.model) == before
    with torch.no_grad():
        host.model.get_parameter("lm_head.weight")[0, 0] += 1
    assert differing(before, Fingerprint.of_model(host.model)) == ["weights"]


def test_a_fingerprint_that_is_none():
    with pytest.raises(AdapterError, match="not one"):
        Fingerprint.read({"weights": "x"})
