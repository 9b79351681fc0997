"""Write an adapter as another program takes it: PEFT's folder, the plain LoRA that vLLM serves, or a folded model.

What is plain LoRA already is copied, or keeps its very tensors. Any other change of weights becomes the nearest LoRA of
the rank that is asked for, or of the least rank whose error is allowed, and what that costs is stated by site. What
LoRA has no place for (biases, norms, tables, bottlenecks) is refused by site: fold it (--to transformers).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tarsia.cli import output, shelved

if TYPE_CHECKING:
    from tarsia.adapter import Adapter, Host, Outline
    from tarsia.merge.export import Exported

HELP = "write an adapter as PEFT, vLLM or Transformers takes it"
SHOWN = 12
"""Sites that are told of by name, those with the largest errors first."""


def options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tarsia export``."""
    parser.add_argument("adapter", metavar="ADAPTER", help=f"an adapter's folder, that of a run, {shelved.FORMS}")
    parser.add_argument("--to", required=True, choices=("peft", "vllm", "transformers"), help="who is to take it")
    parser.add_argument("--out", required=True, metavar="FOLDER", type=Path, help="where to write it: not there yet")
    parser.add_argument("--base", metavar="MODEL", help="the base (default: the one that the adapter names)")
    parser.add_argument("--rank", type=int, metavar="R", help="the highest rank of what is not thin already")
    parser.add_argument(
        "--max-error", type=float, metavar="E",
        help="the largest error of a site, as a share of its change (Frobenius): the least rank within it is taken",
    )  # fmt: skip
    parser.add_argument(
        "--onto", choices=("dequantised", "original"),
        help="for --to transformers of an adapter that was trained over 4 bits: what it is folded into",
    )  # fmt: skip
    parser.add_argument(
        "--no-proof", action="store_true", help="do not open the base to compare outputs with the adapter's own"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")


def run(args: argparse.Namespace) -> int:
    """Write the folder, and print what became of each site."""
    from tarsia.core.errors import ConfigError

    output.no_bars()
    if args.to == "transformers":
        chosen = {"--rank": args.rank, "--max-error": args.max_error}
        if given := [name for name, value in chosen.items() if value is not None]:
            raise ConfigError("A fold has no rank: it loses nothing.", given=given[0], do=f"leave {given[0]} out")
        return _folded(args)
    if args.onto is not None:
        raise ConfigError("Only a fold asks what it is made onto.", given="--onto", do="leave it out")
    folder = where(args.adapter)
    adapter, base = opened(folder, args.base)
    exported, proof = _exported(args, folder, adapter, base)
    _show(args, adapter, base, exported, proof)
    return 0


def where(given: Path | str) -> Path:
    """The adapter's own folder, where that of its run, or a version of the library, was given.

    Raises AdapterError where there is no adapter, LibraryError where the library has it not, or not whole.
    """
    from tarsia.adapter.files import is_adapter
    from tarsia.cli.adapted import OF_A_RUN
    from tarsia.core.errors import AdapterError

    folder = shelved.folder(given)
    found = next((path for path in (folder, folder / OF_A_RUN) if is_adapter(path)), None)
    if found is None:
        raise AdapterError("There is no such adapter.", given=str(folder), do="give the folder that it was saved in")
    return found


def opened(folder: Path, name: str | None) -> tuple[Adapter, Host | Outline]:
    """The adapter, and its base: as an outline, its weights read one at a time, wherever that is enough.

    A folder that PEFT made is understood against the base itself, and what a patch changes in one that was rounded to
    4 bits is known only there.
    """
    from tarsia.adapter import load, open_outline
    from tarsia.adapter.files import OURSELVES
    from tarsia.core.method import find

    if not (folder / OURSELVES).is_file():
        host = base_of(folder, name)
        return load(folder, host), host
    adapter = load(folder)
    reads = any(not hasattr(find(patched.method).patch, "delta") for patched in adapter.patches.values())
    if reads and adapter.fingerprint is not None and adapter.fingerprint.quantisation != "none":
        return adapter, base_of(folder, name)
    return adapter, open_outline(named(folder, name), processor=False, weights=reads)


def named(folder: Path, name: str | None) -> str:
    """The base that was given, or else the one that the adapter names. Raises ConfigError where nobody says."""
    from tarsia.adapter.files import CONFIG
    from tarsia.adapter.reading import read_json
    from tarsia.core.errors import ConfigError

    found = name or read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(found, str) or not found:
        raise ConfigError(
            "The adapter does not say which base it belongs to.", given=str(folder), do="add --base MODEL"
        )
    return found


def base_of(folder: Path, name: str | None) -> Host:
    """The base in memory, in the form that the adapter was trained over."""
    from tarsia.adapter import FourBits, open_base, recorded
    from tarsia.adapter.host import QuantisedAlready

    held = recorded(folder)
    form = None if held is None else FourBits.of(held.quantisation)
    try:
        return open_base(named(folder, name), four_bits=form)
    except QuantisedAlready:  # its files hold the form that the adapter asks for
        return open_base(named(folder, name))


def _exported(
    args: argparse.Namespace, folder: Path, adapter: Adapter, base: Host | Outline
) -> tuple[Exported, dict[str, Any] | None]:
    """What was written, and what it does on the adapter's probe: None where that is not asked, or there is none.

    Raises MergeError, with nothing left behind, where it is not what it should be.
    """
    from dataclasses import asdict

    from tarsia.adapter import Host, load
    from tarsia.merge.export import to_peft, to_vllm
    from tarsia.merge.kept import kept

    proof: dict[str, Any] = {}

    def check(fresh: Path, error: float) -> None:
        host = base if isinstance(base, Host) else base_of(folder, args.base)
        proof.update(asdict(kept(host, adapter, load(fresh, host, allow=("base name",)), error)))

    chosen: dict[str, Any] = {"rank": args.rank, "most": args.max_error}
    if adapter.probe is not None and not args.no_proof:
        chosen["check"] = check
    if args.to == "peft":
        exported = to_peft(folder, adapter, base, args.out, **chosen)
    else:
        exported = to_vllm(adapter, base, args.out, **chosen)
    for note in _unproved(args, adapter, base):
        print(f"tarsia: note: {note}", file=sys.stderr)
    return exported, proof or None


def _unproved(args: argparse.Namespace, adapter: Adapter, base: Host | Outline) -> list[str]:
    """What nobody looked at, in words."""
    from tarsia.adapter import Host
    from tarsia.merge.belonging import weights_here

    found = []
    if adapter.probe is None and not args.no_proof:
        found.append("the adapter has no probe, so its outputs are not compared")
    if adapter.fingerprint is None:
        found.append(f"the adapter does not say which base it belongs to: it is taken for one of {base.name}")
    elif (adapter.probe is None or args.no_proof) and not isinstance(base, Host) and not weights_here(base.path):
        found.append(f"the weights of {base.name} are not on this machine, so its architecture alone was looked at")
    return found


def _show(
    args: argparse.Namespace, adapter: Adapter, base: Host | Outline, exported: Exported, proof: dict[str, Any] | None
) -> None:
    made = exported.thinned
    told: dict[str, Any] = {"out": str(exported.folder), "to": args.to, "copied": made is None}
    if made is not None:
        told |= {"error": made.error, "errors": dict(made.errors), "ranks": dict(made.ranks)}
        told |= {"exact": len(made.exact), "left_out": list(made.still)}
    told |= {"options": list(exported.options), "outputs": proof}
    if args.json:
        output.line(told)
        return
    if made is None:
        print(f"{exported.folder}: a copy, for PEFT can express all of it ({len(adapter.patches)} patches)")
    else:
        _table(adapter, exported)
    if proof is not None:
        print(
            f"on the {proof['rows']} rows of its probe a logit differs from the adapter's own by at most "
            f"{proof['difference']:.2g} of the largest (the adapter moves it by {proof['moved']:.2g}); "
            f"{proof['agreement']:.1%} have the same likeliest token"
        )
    served = _served(adapter, base)
    if exported.options:
        print(f"serve it with: vllm serve {served} {' '.join(exported.options)} \\")
        print(f"    --lora-modules {exported.folder.name}={exported.folder}")


def _served(adapter: Adapter, base: Host | Outline) -> str:
    """The base as vLLM is to be given it: a folder, or the hub's id. Of a base in 4 bits it is said which that is."""
    from tarsia.adapter import FourBits
    from tarsia.base import NAMES

    embedded = base.name in NAMES and base.path is not None
    name = shlex.quote(str(base.path) if embedded else base.name)
    form = None if adapter.fingerprint is None else FourBits.of(adapter.fingerprint.quantisation)
    if form is None:  # over the files' own numbers
        return name
    print(
        f"it was learnt over a base in 4 bits ({form.text}), and {name} holds other numbers. "
        "Write those down and take that folder,\n"
        f"    tarsia quantise {name} --out BASE-IN-4-BITS --kind {form.kind}{'' if form.nested else ' --no-nested'}"
        f"{'' if form.select is None else f' --select {shlex.quote(form.select)}'}\n"
        "or make one model of both: tarsia fold --onto dequantised"
    )
    return "BASE-IN-4-BITS"


def _table(adapter: Adapter, exported: Exported) -> None:
    made = exported.thinned
    assert made is not None
    order = sorted((p for p in made.errors if p not in made.exact), key=lambda path: -made.errors[path])
    rows = [[path, adapter.patches[path].method, str(made.ranks[path]), f"{made.errors[path]:.2g}"] for path in order]
    title = f"{exported.folder}: {len(made.errors)} sites as LoRA, {made.error:.3g} off in all (Frobenius, relative)"
    if rows:
        output.table(title, ("site", "was", "rank", "error"), rows[:SHOWN], right=("rank", "error"))
    else:
        print(title)
    if len(rows) > SHOWN:
        print(f"and {len(rows) - SHOWN} more sites with an error of at most {made.errors[order[SHOWN]]:.2g}")
    if made.exact:
        print(f"{len(made.exact)} sites were LoRA already and keep their tensors")
    if made.still:
        print(f"left out, for the adapter does not change them: {', '.join(made.still)}")


def _folded(args: argparse.Namespace) -> int:
    """Fold it: what `tarsia fold` does, with the same proof."""
    from tarsia.merge.fold import fold

    folder = where(args.adapter)
    if args.no_proof:
        print("tarsia: note: a fold is always proved; --no-proof is for --to peft and vllm", file=sys.stderr)
    found = fold(
        named(folder, args.base),
        folder,
        args.out,
        onto=args.onto,
        show=lambda line: print(f"tarsia: {line}", file=sys.stderr),
    )
    proof = found.proof.values
    if args.json:
        output.line({"out": str(args.out), "to": args.to, "outputs": proof})
        return 0
    print(
        f"{args.out}: a model with the adapter folded in, for plain Transformers; on {proof['rows']} rows a logit "
        f"differs from the adapter's own by at most {proof['relative']:.2g} of the largest"
    )
    return 0
