"""An adapter made part of its base, in a new folder: streamed, measured and proved; the base's files stay as they are.

The result loads with plain Transformers, costs nothing more to run than the base, and says what the adapter says. What
can not be so is refused, and nothing is left behind.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from tarsia.adapter.atomic import write_folder
from tarsia.adapter.export import copy_beside
from tarsia.adapter.fingerprint import shards
from tarsia.adapter.four_bits import FourBits, Quantisation, choose
from tarsia.adapter.host import Outline, open_base, open_outline, processor_in
from tarsia.adapter.reading import header, read_json
from tarsia.adapter.stored import written_config
from tarsia.adapter.value import Adapter
from tarsia.core.errors import ConfigError, MergeError
from tarsia.core.site import Kind
from tarsia.merge.adapters import digest
from tarsia.merge.folding import Folding
from tarsia.merge.form import Form, Onto, form_of
from tarsia.merge.live import Bar, Live, check_folds, check_starts, listened, own
from tarsia.merge.proof import Proof, proved
from tarsia.merge.remains import Remains, of_all, worst
from tarsia.merge.streams import INDEX, Streams, write_index
from tarsia.merge.units import Stored

RECORD: Final = "tarsia_fold.json"
"""Beside the weights: base, adapters, choice, what remains and the proof."""
Show = Callable[[str], None]
"""Told, before it is done, what is done."""


@dataclass(frozen=True, slots=True)
class Folded:
    """What was written: the folder, its record, the proof, and what remains of the change by parameter."""

    out: Path
    record: Mapping[str, Any]
    proof: Proof
    remains: Mapping[str, Remains]


def fold(  # noqa: PLR0913 (the choices of one fold)
    base: str,
    adapters: Adapter | Path | str | Sequence[Adapter | Path | str],
    out: Path | str,
    *,
    onto: Onto | None = None,
    over: FourBits | None = None,
    requantise: FourBits | None = None,
    bar: Bar = Bar(),  # noqa: B008 (frozen)
    show: Show = lambda line: None,
) -> Folded:
    """Write the base with ``adapters`` folded in, each over those before it, into the new folder ``out``.

    Of adapters trained over 4 bits ``onto`` says what they are folded into: the numbers that the 4 bits stand for
    ("dequantised", which is what they were trained over) or those of the 16-bit files ("original"). PEFT's do not say
    what they were trained over: ``over`` does, and without it they are folded into the files' own numbers, which is
    told and recorded. ``requantise`` rounds the result to 4 bits again. Where less of the change is left, measured,
    than ``bar`` wants, the fold is refused. It is proved on the adapters' own probes and on the bar's rows. One model
    at a time is in memory, and while the files are written a few of its tensors are.

    Raises MergeError for a method that does not fold, for files that hold a weight in a form that can not be written,
    and where a check fails; ConfigError for a choice that is missing or makes no sense; BaseMismatch and AdapterError
    as ``put`` and ``open_base`` do. ``out`` is there whole or not at all.
    """
    given = [adapters] if isinstance(adapters, Adapter | Path | str) else list(adapters)
    out = Path(out)
    _check_asked(given, out)
    known = [one if isinstance(one, Adapter) else own(Path(one)) for one in given]
    for adapter in known:
        if adapter is not None:
            check_folds(adapter)
    outline = open_outline(base, processor=False, weights=True)
    form = form_of(outline.path, known, onto, over)
    if form.unknown:
        show(f"what the adapter was trained over is not known, PEFT does not write it: {form.numbers} are taken for it")
    opened = None if onto == "original" else form.asked
    allow = ("quantisation",) if onto == "original" or over is not None else ()
    show(f"running the adapter on {base}")
    live = listened(base, given, known, opened, allow, bar)
    gc.collect()
    check_starts(live, onto)
    folding = _planned(outline, live, form, onto, requantise)

    record: dict[str, Any] = {}
    proof: list[Proof] = []

    def write(fresh: Path) -> None:
        write_files(outline, folding, fresh, show)
        folding.check_measured()
        _check_kept(folding.remains, bar.keep, requantise)
        show("holding the folded model to the adapter")
        proof.append(_proved(fresh, outline.path, live, folding))
        chosen = {"over": form.text, "onto": onto, "requantised": None if requantise is None else requantise.text}
        record.update(_record(base, outline, live, chosen, folding.remains, proof[0]))
        (fresh / RECORD).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    write_folder(out, write, lambda there: False, what="folded base")
    return Folded(out, record, proof[0], dict(folding.remains))


def _check_asked(given: Sequence[Adapter | Path | str], out: Path) -> None:
    if not given:
        raise ConfigError("There is no adapter to fold.", do="name at least one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("Something is there already.", given=str(out), do="choose another folder, or remove it first")


def _planned(outline: Outline, live: Live, form: Form, onto: Onto | None, requantise: FourBits | None) -> Folding:
    """What is folded into what. Raises as ``fold`` does."""
    stored = Stored.of(outline.model, shards(outline.path))
    packed = frozenset(name for name, unit in stored.units.items() if unit.packed)
    coarse: frozenset[str] = frozenset()
    if form.asked is not None and onto == "dequantised":
        coarse = choose(form.asked, outline.model, outline.sites).names
    fine = frozenset() if requantise is None else _rounded(outline, requantise).names
    return Folding(
        stored,
        live.layers,
        coarse=coarse,
        scheme=None if form.asked is None else form.asked.scheme,
        fine=fine,
        into=None if requantise is None else requantise.scheme,
        also=packed,
    )


def _rounded(outline: Outline, form: FourBits) -> Quantisation:
    return choose(form, outline.model, outline.sites, kinds=frozenset({Kind.WEIGHT}))


def write_files(outline: Outline, folding: Folding, fresh: Path, show: Show) -> None:
    """Write all files of a folded base, but its record, into the folder ``fresh``."""
    streams = Streams(folding)
    sources = tuple(folding.stored.tables)
    same = not folding.fine and not folding.also
    index: dict[str, str] = {}
    for number, path in enumerate(sources, 1):
        show(f"writing {path.name}" + (f" ({number} of {len(sources)})" if len(sources) > 1 else ""))
        if same:
            streams.same_size(path, fresh / path.name)
        else:
            index |= streams.other_size(path, fresh / path.name)
    copy_beside(outline.path, fresh)
    (fresh / RECORD).unlink(missing_ok=True)
    config = read_json(outline.path / "config.json")
    if same:
        (fresh / "config.json").write_bytes((outline.path / "config.json").read_bytes())
        if (outline.path / INDEX).is_file():
            (fresh / INDEX).write_bytes((outline.path / INDEX).read_bytes())
        return
    config.pop("quantization_config", None)
    (config.get("text_config") or {}).pop("quantization_config", None)
    if folding.into is not None:
        found = FourBits(folding.into.kind, folding.into.nested)
        config["quantization_config"] = written_config(found, outline.model, folding.fine, _computed(config))
    (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if len(sources) > 1 or (outline.path / INDEX).is_file():
        tables = [header(fresh / path.name)[0] for path in sources]
        ends = (entry["data_offsets"] for table in tables for entry in table.values())
        write_index(fresh, index, sum(last - first for first, last in ends))


def _computed(config: Mapping[str, Any]) -> str:
    said = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return said if said in ("float32", "float16", "bfloat16") else "float32"


def _check_kept(remains: Mapping[str, Remains], keep: float, requantise: FourBits | None) -> None:
    """Raise MergeError, with the figures, where less of the change is left than ``keep``.

    Of numbers rounded to 4 bits the change must also be that share of what differs: numbers that lie on no grid keep
    any change in the mean, whatever is rounded away.
    """
    whole = of_all(remains)
    if requantise is not None and whole.share >= keep > whole.clean:
        raise MergeError(
            f"Rounding to {requantise.numbers} moves the weights by {whole.stray:.3g} times what the adapter changes.",
            given=f"|d|/|W| {whole.size:.2e} in all; {whole.clean:.1%} of what differs would be the adapter's",
            allowed=f"at least {keep:.0%}",
            do="keep it as an adapter over the base in 4 bits, leave --requantise out, or lower --keep on purpose",
        )
    if whole.share >= keep:
        return
    lines = "; ".join(f"{name} {one.share:.1%} of |d|/|W| {one.size:.2e}" for name, one in worst(remains))
    how = f"rounding to {requantise.numbers}" if requantise is not None else "the files' precision"
    raise MergeError(
        f"Of what the adapter changes {whole.share:.1%} would be left: {how} takes the rest away.",
        given=f"|d|/|W| {whole.size:.2e} in all; least is left of {lines}",
        allowed=f"at least {keep:.0%}",
        do="keep it as an adapter over this base, fold into files of a finer form, or lower --keep on purpose",
    )


def _proved(fresh: Path, source: Path, live: Live, folding: Folding) -> Proof:
    """Load what was written and hold it to what the live adapter said."""
    gc.collect()
    if (source / "preprocessor_config.json").is_file() or (source / "processor_config.json").is_file():
        processor_in(fresh)
    if folding.into is None:
        model = _plain(fresh, live.precision, folding.stored.left_over)
    else:
        model = _opened(fresh, live.precision)
    return proved(model, live.heard, live.moved, folding.remains, live.precision)


def _opened(fresh: Path, precision: str) -> nn.Module:
    chosen: Any = precision
    return open_base(str(fresh), dtype=chosen, processor=False).model


def _plain(fresh: Path, precision: str, left_over: frozenset[str]) -> nn.Module:
    """The folder as everybody opens it.

    Raises MergeError where a tensor is missing, or left over that the base's files do not leave over too.
    """
    from transformers import AutoModelForImageTextToText

    loaded: tuple[nn.Module, dict[str, Any]] = AutoModelForImageTextToText.from_pretrained(
        fresh, dtype=getattr(torch, precision), use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    model, report = loaded
    wrong = {what: sorted(map(str, report.get(what) or ())) for what in ("missing_keys", "mismatched_keys")}
    wrong["error_msgs"] = sorted(map(str, report.get("error_msgs") or ()))
    wrong["unexpected_keys"] = sorted(set(report.get("unexpected_keys") or ()) - left_over)
    if any(wrong.values()):
        raise MergeError(
            "Transformers does not load the folded base whole.",
            given="; ".join(f"{what} {', '.join(names[:3])}" for what, names in wrong.items() if names),
            do="report this, with the version of transformers; nothing was left behind",
        )
    return model.eval()


def _record(
    base: str,
    outline: Outline,
    live: Live,
    chosen: Mapping[str, str | None],
    remains: Mapping[str, Remains],
    proof: Proof,
) -> dict[str, Any]:
    from tarsia import __version__

    whole = of_all(remains)
    before = outline.path / RECORD
    return {
        "format": 1,
        "tarsia": __version__,
        "base": {"name": base, "fingerprint": asdict(live.fingerprint)},
        "adapters": [
            {"sha256": digest(one), "base": one.base, "methods": sorted({p.method for p in one.patches.values()})}
            for one in live.adapters
        ],
        **chosen,
        "remains": {
            "share": whole.share,
            "size": whole.size,
            "stray": whole.stray,
            "by_parameter": {name: one.values for name, one in sorted(remains.items())},
        },
        "proof": proof.values,
        "folded_from": read_json(before) if before.is_file() else None,
    }
