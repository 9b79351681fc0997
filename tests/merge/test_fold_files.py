"""The files of a folded base: every spelling and form they may have, and whatever may go wrong as they are written."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge.fold_world import LORA, family, saved, trained
from safetensors.torch import load_file, save_file

import tarsia.merge.fold as fold_module
from tarsia.adapter import open_base, open_outline
from tarsia.adapter.fingerprint import shards
from tarsia.core.attach import Part
from tarsia.core.errors import AdapterError, BaseMismatch, ConfigError, MergeError
from tarsia.core.method import METHODS
from tarsia.merge import proof as proof_module
from tarsia.merge import streams, units
from tarsia.merge.fold import RECORD, fold
from tarsia.merge.folding import Folding
from tarsia.merge.live import Bar, listened
from tarsia.merge.streams import INDEX, Streams
from tarsia.methods.lora import LoRA

BETWEEN = streams._between
EXPERTS = Part("full", "@*.experts.*", METHODS["full"].config())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("files") / "base")


@pytest.fixture(scope="module")
def adapter(base):
    return trained(base)


def rewritten(folder, act):
    """Let ``act`` change the tensors of a checkpoint of one file."""
    path = folder / "model.safetensors"
    tensors = act(load_file(path))
    save_file(tensors, path, {"format": "pt"})
    return folder


def exact(folded):
    assert folded.proof.difference <= 1e-5 * folded.proof.peak
    assert folded.proof.moved > 0.02 * folded.proof.peak
    return folded


def test_shards_and_their_index(tmp_path):
    base = saved(tmp_path / "base", shard="60KB")
    exact(fold(str(base), trained(base), tmp_path / "out"))
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(files) > 3
    assert (tmp_path / "out" / INDEX).read_bytes() == (base / INDEX).read_bytes()
    changed = 0
    for name in files:
        mine, theirs = load_file(tmp_path / "out" / name), load_file(base / name)
        assert list(mine) == list(theirs)
        changed += sum(not torch.equal(mine[key], theirs[key]) for key in mine)
        assert (tmp_path / "out" / name).stat().st_size == (base / name).stat().st_size
    assert changed == len(trained(base).patches) + 2  # the projector's two biases


@pytest.mark.slow
def test_names_as_the_model_spells_them(tmp_path):
    base = saved(tmp_path / "base")
    own = open_base(str(base), processor=False).model.state_dict()
    rewritten(base, lambda held: {key: own[key].clone() for key in own if "lm_head" not in key or key in own})
    exact(fold(str(base), trained(base), tmp_path / "out"))
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(own)


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True])
def test_a_head_that_is_the_embedding(both, tmp_path):
    options = {"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": True}
    base = saved(tmp_path / "base", "qwen2_5_vl", **options)
    held = load_file(base / "model.safetensors")
    embed = next(key for key in held if "embed_tokens" in key)
    head = embed.replace("model.embed_tokens", "lm_head") if "language_model" in embed else "lm_head.weight"
    if both:
        rewritten(base, lambda held: {**held, "lm_head.weight": held[embed].clone()})
    part = Part("full", "@model.language_model.embed_tokens", METHODS["full"].config())
    exact(fold(str(base), trained(base, (part,), "qwen2_5_vl"), tmp_path / "out"))
    mine = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in mine) == both, head
    assert not both or torch.equal(mine["lm_head.weight"], mine[embed])


def in_one_tensor(tensors, key):
    """[experts, in, out] in place of [experts, out, in]: as Qwen3-VL-MoE was published."""
    return {k: v.transpose(1, 2).contiguous() if key in k else v for k, v in tensors.items()}


@pytest.mark.parametrize(
    "name",
    ["llava-qwen3_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("transposed", "qwen3_vl_moe"))],
)
def test_experts_in_another_form(name, tmp_path):
    base = saved(tmp_path / "base", "qwen3_vl_moe" if name == "transposed" else name)
    if name == "transposed":
        rewritten(base, lambda held: in_one_tensor(held, "experts."))
    family_name = "qwen3_vl_moe" if name == "transposed" else name
    exact(fold(str(base), trained(base, (EXPERTS,), family_name), tmp_path / "out"))
    mine, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
    assert any("experts.0." in key for key in mine) == (name == "llava-qwen3_moe")


def test_a_form_without_a_way_back_is_refused_by_name(tmp_path, monkeypatch):
    base = saved(tmp_path / "base", "llava-qwen3_moe")
    made = trained(base, (EXPERTS,), "llava-qwen3_moe")
    real = units._reversed
    monkeypatch.setattr(units, "_reversed", lambda *a: {k: 1.5 * v for k, v in real(*a).items()})
    with pytest.raises(MergeError, match=r"experts\..* no way back"):
        fold(str(base), made, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_the_base_leaves_over_may_be_left_over_and_nothing_else(tmp_path, monkeypatch):
    """A tensor that the model has no place for is copied; one that only the fold has is found."""
    base = saved(tmp_path / "base")
    extra = {"model.language_model.nobody.weight": torch.ones(3)}
    rewritten(base, lambda held: held | extra)
    made = trained(base, (LORA,))
    exact(fold(str(base), made, tmp_path / "out"))
    assert set(extra) <= set(load_file(tmp_path / "out" / "model.safetensors"))
    real = fold_module.write_files

    def more(outline, folding, fresh, show):
        real(outline, folding, fresh, show)
        rewritten(fresh, lambda held: held | {"model.language_model.another.weight": torch.ones(3)})

    monkeypatch.setattr(fold_module, "write_files", more)
    with pytest.raises(MergeError, match="does not load the folded base whole") as refusal:
        fold(str(base), made, tmp_path / "two")
    assert "another.weight" in str(refusal.value.given) and "nobody" not in str(refusal.value.given)


def test_stretches_of_any_size_are_the_same(base, tmp_path, monkeypatch):
    made = trained(base, (LORA, Part("lora", "language.*.{up,down}", METHODS["lora"].config(rank=2))))
    outline = open_outline(str(base), processor=False, weights=True)
    live = listened(str(base), [made], [made], None, (), Bar())
    found, runs = set(), set()
    for size, gap in ((1, 0), (9000, 5000), (1 << 22, 1 << 16)):
        monkeypatch.setattr(streams, "STRETCH", size)
        monkeypatch.setattr(streams, "_GAP", gap)
        folding = Folding(units.Stored.of(outline.model, shards(base)), live.layers)
        writer = Streams(folding)
        runs.add(len(list(writer._stretches(base / "model.safetensors"))))
        writer.same_size(base / "model.safetensors", tmp_path / "out")
        folding.check_measured()
        found.add((tmp_path / "out").read_bytes())
    assert len(found) == 1 and len(runs) == 3 and max(runs) == len(made.patches)


@pytest.mark.slow
def test_adapters_over_one_another(base, tmp_path):
    one, other = trained(base, seed=1), trained(base, (LORA,), seed=2)
    folded = exact(fold(str(base), [one, other], tmp_path / "out"))
    assert len({held["sha256"] for held in folded.record["adapters"]}) == 2


@pytest.mark.slow
def test_a_fold_of_a_fold_keeps_its_history(base, adapter, tmp_path):
    fold(str(base), adapter, tmp_path / "one")
    again = fold(str(tmp_path / "one"), trained(tmp_path / "one", seed=3), tmp_path / "two")
    assert again.record["folded_from"]["base"]["name"] == str(base)
    assert again.record["base"]["fingerprint"]["weights"].startswith("files:")


@pytest.mark.parametrize("method", ["houlsby", "prompt", "prefix"])
def test_what_does_not_fold_is_refused_by_site_and_method(method, base, tmp_path):
    made = trained(base, (Part(method, "language", METHODS[method].config()),))
    with pytest.raises(MergeError, match=method) as refusal:
        fold(str(base), made, tmp_path / "out")
    assert next(iter(made.patches)) in str(refusal.value.given) and "lora" in str(refusal.value.allowed)


def test_wrong_inputs(base, adapter, tmp_path):
    other = saved(tmp_path / "other", text_config={"num_hidden_layers": 2})
    with pytest.raises(BaseMismatch):
        fold(str(other), adapter, tmp_path / "out")
    with pytest.raises(ConfigError, match="no adapter"):
        fold(str(base), [], tmp_path / "out")
    with pytest.raises(AdapterError, match="no such adapter"):
        fold(str(base), tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="there already"):
        fold(str(base), adapter, tmp_path / "taken")
    with pytest.raises(ConfigError, match="no rows to prove"):
        fold(str(base), type(adapter)(**{**vars(adapter), "probe": None}), tmp_path / "out")
    blind = family("llava").batch((0, 0))
    probe = type(adapter.probe)(**{**vars(adapter.probe), "inputs": blind})
    with pytest.raises(ConfigError, match="have no picture"):
        fold(str(base), type(adapter)(**{**vars(adapter), "probe": probe}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_shard(tmp_path, adapter):
    base = saved(tmp_path / "base")
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(AdapterError, match="truncated"):
        fold(str(base), adapter, tmp_path / "out")


@pytest.mark.slow
def test_an_adapter_that_hardly_does_anything_proves_nothing(tmp_path):
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    made = trained(base, (LORA,), size=1e-3)
    with pytest.raises(MergeError, match=r"would be left|prove nothing"):
        fold(str(base), made, tmp_path / "out")
    with pytest.raises(MergeError, match="prove nothing"):
        fold(str(base), made, tmp_path / "out", bar=Bar(keep=0))


def doubled(self, weight, out):
    out.copy_(weight + 2 * self.scale * (self.B @ self.A).to(weight.dtype))
    return out


def one_site_less(self):
    self.__dict__["sites"] = {site.path: site for layer in self.layers for site in layer}
    self.sites.pop(next(iter(self.sites)))
    self.jobs = tuple(self._jobs())
    self.by_key = {key: job for job in self.jobs for key in job.keys}


def not_measured(source, target, begin, end, data, measures):
    BETWEEN(source, target, begin, end, data, ())


def not_copied(source, target, begin, end):
    os.pwrite(target, os.pread(source, end - begin, begin)[: (end - begin) // 2] + bytes((end - begin + 1) // 2), begin)


@pytest.mark.parametrize(
    "where,name,bug",
    [
        (LoRA, "fold_into", doubled),
        (Folding, "__post_init__", one_site_less),
        (streams, "copy_range", not_copied),
        (streams, "_between", not_measured),
    ],
)
def test_planted_bugs_are_found_and_nothing_is_left(where, name, bug, base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(where, name, bug)
    with pytest.raises((MergeError, AdapterError)):
        fold(str(base), adapter, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_only_the_proof_finds_another_adapter_in_the_place_of_the_live_one(dtype, tmp_path, monkeypatch):
    """Its scale is a tenth larger: every tensor is what its fold is, and the outputs are not the adapter's."""
    base = saved(tmp_path / "base", dtype=dtype)
    made = trained(base, (LORA,))
    real = fold_module.listened

    def other(*arguments):
        live = real(*arguments)
        for patch in live.layers[0].values():
            patch.scale *= 1.1
        return live

    monkeypatch.setattr(fold_module, "listened", other)
    with pytest.raises(MergeError, match="does not say what the adapter says"):
        fold(str(base), made, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.fixture
def stubbed(base, adapter, monkeypatch):
    """The fold with what the live adapter said known, and the proof as it came out: the writing alone is run."""
    live = listened(str(base), [adapter], [adapter], None, (), Bar())
    outline = open_outline(str(base), processor=False, weights=True)
    monkeypatch.setattr(fold_module, "open_outline", lambda *_, **__: outline)
    found = proof_module.Proof(1, 1, True, "float32", *[1.0] * 10)
    monkeypatch.setattr(fold_module, "listened", lambda *_: live)
    monkeypatch.setattr(fold_module, "_proved", lambda *_: found)


def dying(moment):
    """From now on the process is killed at its ``moment``-th call that touches the disk."""
    left = [moment]

    def counted(function):
        def call(*args, **options):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in ("pwrite", "copy_file_range", "fsync", "rename", "mkdir", "open"):
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.slow
def test_killed_at_any_moment_it_is_there_whole_or_not_at_all(base, adapter, stubbed, tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("forks")
    out = tmp_path / "out"
    ends = set()
    for moment in (2, 9, 20, 30, 100):
        if (child := os.fork()) == 0:
            try:
                dying(moment)
                fold(str(base), adapter, out)
                os._exit(0)
            finally:
                os._exit(7)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        if out.exists():
            assert json.loads((out / RECORD).read_text())["format"] == 1
            assert set(load_file(out / "model.safetensors")) == set(load_file(base / "model.safetensors"))
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
            ends.add("whole")
        else:
            ends.add("nothing")
    assert ends == {"whole", "nothing"}
    fold(str(base), adapter, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what dead writers left is taken away"


def test_a_full_disk_leaves_nothing(base, adapter, stubbed, tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
        with pytest.raises(AdapterError, match="can not be written"):
            fold(str(base), adapter, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(tmp_path.iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(AdapterError, match="No space left"):
        fold(str(base), adapter, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_where_the_system_does_not_copy_the_bytes_are_the_same(base, adapter, stubbed, tmp_path, monkeypatch):
    fold(str(base), adapter, tmp_path / "one")

    def refused(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refused)
    monkeypatch.setattr(streams, "_CHUNK", 1000)
    fold(str(base), adapter, tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_what_lies_between_is_copied_bit_by_bit(base, adapter, tmp_path):
    """With every touched tensor left as it is, the stream is the file."""
    outline = open_outline(str(base), processor=False, weights=True)
    folding = Folding(units.Stored.of(outline.model, shards(base)), ({},))
    Streams(folding).same_size(base / "model.safetensors", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (base / "model.safetensors").read_bytes()


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 40),
    into=st.integers(1, 40),
    rank=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    tile=st.integers(1, 200),
    scale=st.floats(-4, 4),
)
def test_tiles_do_not_show(out, into, rank, dtype, tile, scale):
    """LoRA folded by tiles, elsewhere or in place, is W + scale B A rounded once."""
    from tarsia.methods import lora

    draw = torch.Generator().manual_seed(out * 41 + into)
    weight = torch.randn(out, into, generator=draw).to(dtype)
    patch = LoRA(torch.randn(rank, into, generator=draw), torch.randn(out, rank, generator=draw), scale)
    was, lora.TILE = lora.TILE, tile
    try:
        with torch.no_grad():
            made, bias = patch.fold(weight, None)
        again = patch.fold_into(weight.clone(), weight.clone().zero_())
        place = weight.clone()
        patch.fold_into(place, place)
    finally:
        lora.TILE = was
    change = scale * (patch.B.double() @ patch.A.double())
    wide = weight.double() + change
    assert bias is None and made.dtype == dtype
    assert torch.equal(made, again) and torch.equal(made, place)
    eps = max(torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps)
    assert ((made.double() - wide).abs() <= eps * wide.abs() + 1e-5 * change.abs() + 1e-5).all()
