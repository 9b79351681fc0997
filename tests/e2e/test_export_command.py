"""``tarsia export``: what is copied, what becomes LoRA at what cost, what vLLM takes, and what is refused."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e.made_adapters import batch, made, saved
from peft import PeftModel
from safetensors.torch import load_file
from train import small
from transformers import LlavaForConditionalGeneration

import tarsia.cli
from tarsia.adapter import FourBits, Host, load, open_base, put, save
from tarsia.cli import export as verb
from tarsia.core.attach import detach
from tarsia.merge import vllm


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return open_base(str(small.base(tmp_path_factory.mktemp("world") / "base")))


def export(*arguments: object) -> int:
    return tarsia.cli.main(["export", *map(str, arguments)])


def said(host: Host, folder: Path) -> torch.Tensor:
    """Logits under the adapter in ``folder``."""
    adapter = load(folder, host)
    put(host, adapter, "live")
    try:
        with torch.no_grad():
            logits: torch.Tensor = host.model(**batch(host)).logits
    finally:
        detach(host.model, "live")
    return logits


def by_peft(host: Host, folder: Path) -> torch.Tensor:
    model = LlavaForConditionalGeneration.from_pretrained(host.path)
    with torch.no_grad():
        logits: torch.Tensor = PeftModel.from_pretrained(model, folder).eval()(**batch(host)).logits
    return logits


def test_what_peft_can_express_is_copied(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = (("lora", "language.*.{q,v}", {"rank": 3}), ("full", "projector", {}))
    one, out = saved(host, tmp_path / "a", parts), tmp_path / "out"
    assert export(one, "--to", "peft", "--out", out) == 0
    assert "a copy" in capsys.readouterr().out
    names = ("adapter_config.json", "adapter_model.safetensors", "tarsia.json", "probe.safetensors")
    assert all((one / name).read_bytes() == (out / name).read_bytes() for name in names)
    assert torch.allclose(by_peft(host, out), said(host, one), atol=1e-5)


def test_what_peft_has_no_place_for_becomes_lora(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = saved(host, tmp_path / "a", [("vera", "language.*.{q,v}", {"rank": 8})]), tmp_path / "out"
    assert export(one, "--to", "peft", "--out", out, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert not told["copied"]
    assert 0 < told["error"] < 1e-6
    assert told["outputs"]["difference"] < 1e-4 < told["outputs"]["moved"]
    assert torch.allclose(by_peft(host, out), said(host, one), atol=1e-4)


def test_vllm_gets_plain_lora_of_a_dora(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = (("dora", "language.*.{q,v}", {"rank": 2}), ("lora", "vision.0.q", {"rank": 3}))
    one, out = saved(host, tmp_path / "a", parts), tmp_path / "out"
    assert export(one, "--to", "vllm", "--out", out, "--max-error", 0.2, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert 0 < told["error"] <= 0.2
    assert told["exact"] == 1
    assert "--enable-tower-connector-lora" in told["options"]
    config = json.loads((Path(host.path or "") / "config.json").read_text())
    assert vllm.judge(vllm.read(out, config)).served
    keys = load_file(out / "adapter_model.safetensors")
    assert any("vision_tower.vision_model.encoder.layers.0" in key for key in keys)
    beside = json.loads((out / "export.json").read_text())
    assert beside["errors"] == told["errors"]
    assert 0 < told["outputs"]["difference"] < told["outputs"]["moved"]


def test_what_is_said_is_what_is_lost(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More rank, less off: in the weights as in the outputs, and neither is made up."""
    one = saved(host, tmp_path / "a", [("dora", "language.*.{q,v}", {"rank": 2})])
    told: list[dict[str, Any]] = []
    for rank in (1, 4, 16):
        assert export(one, "--to", "vllm", "--out", tmp_path / str(rank), "--rank", rank, "--json") == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["error"] > told[1]["error"] > told[2]["error"] > 0
    assert told[0]["outputs"]["difference"] > told[2]["outputs"]["difference"]


def test_peft_opens_what_is_for_vllm_where_names_are_alike(host: Host, tmp_path: Path) -> None:
    """With scales and ranks that differ, which are folded into B: one scale is left."""
    parts = (("rslora", "language.*.q", {"rank": 3}), ("lora", "language.*.v", {"rank": 2, "alpha": 5.0}))
    one, out = saved(host, tmp_path / "a", parts), tmp_path / "out"
    assert export(one, "--to", "vllm", "--out", out) == 0
    fields = json.loads((out / "adapter_config.json").read_text())
    assert fields["lora_alpha"] == fields["r"]
    assert all(fields["alpha_pattern"][name] == rank for name, rank in fields["rank_pattern"].items())
    assert torch.allclose(by_peft(host, out), said(host, one), atol=1e-5)


@pytest.mark.parametrize("method, options", [("lora", ()), ("dora", ("--max-error", 0.02))])
def test_what_was_learnt_over_4_bits_is_held_to_them(
    method: str, options: Any, host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = open_base(host.name, four_bits=FourBits("nf4"))
    one, out = saved(packed, tmp_path / "a", [(method, "language.*.{q,v}", {"rank": 2})]), tmp_path / "out"
    assert export(one, "--to", "vllm", "--out", out, *options) == 0
    told = capsys.readouterr().out
    assert "in 4 bits" in told
    assert f"tarsia quantise {host.name} --out BASE-IN-4-BITS --kind nf4" in told
    assert "vllm serve BASE-IN-4-BITS" in told
    assert ("exact" in told or "keep their tensors" in told) == (method == "lora")
    found = float(re.search(r"at most ([\d.e-]+) of the largest", told)[1])  # type: ignore[index]
    assert found < (1e-5 if method == "lora" else 0.1)


def test_transformers_gets_a_folded_model(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, out = saved(host, tmp_path / "a", [("full", "projector", {})]), tmp_path / "out"
    assert export(one, "--to", "transformers", "--out", out) == 0
    with torch.no_grad():
        logits = LlavaForConditionalGeneration.from_pretrained(out)(**batch(host)).logits
    assert torch.allclose(logits, said(host, one), atol=1e-4)
    assert "folded in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "parts, options, wanted",
    [
        ([("full", "projector", {})], (), "a bias"),
        ([("full", "language.*.norm", {})], (), "norm"),
        ([("houlsby", "language", {"reduction": 4})], (), "houlsby"),
        ([("oft", "language.*.q", {})], (), "--max-error"),
        ([("oft", "language.*.q", {})], ("--rank", 2, "--max-error", 0.01), "larger than 0.01"),
        ([("lora", "language.*.q", {})], ("--rank", 0), "at least 1"),
        ([("lora", "language.*.q", {})], ("--max-error", 2), "below 1"),
        ([("lora", "language.*.q", {})], ("--onto", "original"), "--onto"),
    ],
)
def test_what_can_not_be_is_refused_by_site(
    host: Host, tmp_path: Path, parts: Any, options: Any, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = saved(host, tmp_path / "a", parts), tmp_path / "out"
    assert export(one, "--to", "vllm", "--out", out, *options) == 2
    assert wanted in capsys.readouterr().err
    assert not out.exists()


def test_nothing_is_written_over(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = saved(host, tmp_path / "a", [("vera", "language.*.q", {"rank": 2})])
    for to in ("peft", "vllm"):
        assert export(one, "--to", to, "--out", one) == 2
        assert "there already" in capsys.readouterr().err
    load(one)


def test_a_folder_that_is_none_and_a_base_that_is_not_named(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path, "--to", "peft", "--out", tmp_path / "out") == 2
    assert "no such adapter" in capsys.readouterr().err
    one = tmp_path / "a"
    save(replace(made(host, [("lora", "language.*.q", {"rank": 2})]), base=None), one)
    assert export(one, "--to", "vllm", "--out", tmp_path / "out") == 2
    assert "--base" in capsys.readouterr().err


def test_outputs_that_are_not_the_adapters_fail_it(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A factor that is off by a tenth, and said to be exact."""
    from tarsia.merge import thin

    one, out = saved(host, tmp_path / "a", [("vera", "language.*.q", {"rank": 4})]), tmp_path / "out"
    true = thin._balanced
    monkeypatch.setattr(thin, "_balanced", lambda up, down: true(1.1 * up, down))
    monkeypatch.setattr(thin, "rounding", lambda *factors: 0.0)
    assert export(one, "--to", "vllm", "--out", out) == 2
    assert "the outputs are not" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("to, method", [("peft", "lora"), ("peft", "vera"), ("vllm", "lora")])
def test_what_is_not_proved_yet_has_no_name(
    to: str, method: str, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the proof: nothing is there, and nothing was there while it ran."""
    from tarsia.merge import kept

    one, out = saved(host, tmp_path / "a", [(method, "language.*.q", {"rank": 2})]), tmp_path / "out"
    there = []

    def stopped(*given: object) -> None:
        there.append(out.exists())
        raise KeyboardInterrupt

    monkeypatch.setattr(kept, "kept", stopped)
    parser = argparse.ArgumentParser()
    verb.options(parser)
    with pytest.raises(KeyboardInterrupt):
        verb.run(parser.parse_args([str(one), "--to", to, "--out", str(out)]))
    assert there == [False]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_without_a_proof_it_is_held_to_the_base_nevertheless(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = saved(host, tmp_path / "a", [("lora", "language.*.q", {"rank": 2})], probed=False), tmp_path / "out"
    other = small.base(tmp_path / "other", text_config={"rms_norm_eps": 0.5})
    assert export(one, "--to", "vllm", "--out", out, "--base", other, "--no-proof") == 2
    assert "another base" in capsys.readouterr().err
    assert not out.exists()
    silent = tmp_path / "silent"
    save(replace(load(one), fingerprint=None), silent)
    assert export(silent, "--to", "vllm", "--out", out) == 0
    told = capsys.readouterr().err
    assert "does not say which base" in told
    assert "no probe" in told
