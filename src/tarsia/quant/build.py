"""Compile the kernels: ``python -m tarsia.quant.build``, and the same from the hook that makes a wheel.

One source for each instruction set, each compiled with its own flags, linked into one shared library beside them:
that of weights in 4 bits, that of merging and that of serving.
Needs a C compiler ($CC, else cc, gcc or clang) and nothing else: it is run before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]

# No fused multiply-add but where it is written: bits are to be equal on every processor.
COMMON = ("-std=gnu11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra")

# no more than the dispatchers ask the processor for
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")


@dataclass(frozen=True, slots=True)
class Library:
    """A shared library and what it is compiled of. Its sources lie in ``folder``, or are named from there.

    ``name``.c is the dispatcher: NAME_HAVE_AVX2 and so on tell it which sources there are. Its functions begin with
    ``name``, and name_digest says what it was compiled of.
    """

    name: str
    folder: Path
    everywhere: tuple[str, ...]
    sets: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Machine: its sources besides those of every machine, and the flags of each."""

    @property
    def file(self) -> str:
        """The library's file name."""
        return f"lib{self.name}.so"

    @property
    def path(self) -> Path:
        """Where it lies once it is compiled."""
        return self.folder / self.file

    def at(self, folder: Path) -> Library:
        """The same of sources that lie elsewhere."""
        return replace(self, folder=folder)

    def sources(self, machine: str) -> dict[Path, tuple[str, ...]]:
        """Each source for ``machine``, with its own flags."""
        of: dict[str, tuple[str, ...]] = dict.fromkeys(self.everywhere, ())
        of |= self.sets.get(machine, {})
        return {(self.folder / name).resolve(): flags for name, flags in of.items()}

    def folders(self) -> list[Path]:
        """Where sources and their headers lie."""
        return sorted({(self.folder / name).resolve().parent for name in self.everywhere})

    def digest(self, machine: str) -> str:
        """What the library of these sources and flags is known by, 16 hexadecimal digits."""
        of = hashlib.sha256(repr((COMMON, machine)).encode())
        for path, flags in self.sources(machine).items():
            of.update(repr((path.name, flags)).encode() + path.read_bytes())
        for path in (path for folder in self.folders() for path in sorted(folder.glob("*.h"))):
            of.update(path.name.encode() + path.read_bytes())
        return of.hexdigest()[:16]

    def fresh(self) -> bool:
        """Whether what is compiled is of this machine and of the sources that lie beside it, where any do."""
        if not (self.folder / f"{self.name}.c").exists():
            return True
        return self.digest(machine()).encode() in self.path.read_bytes()

    def defines(self, machine: str) -> list[str]:
        """What tells the dispatcher which sources there are."""
        return [f"-D{self.name.upper()}_HAVE_{Path(name).stem.upper()}" for name in self.sets.get(machine, {})]


FOUR_BITS = Library(
    "tarsia4",
    PACKAGE / "quant" / "kernels",
    ("tarsia4.c", "team.c", "portable.c"),
    {
        "x86_64": {
            "avx2.c": ("-mavx2", "-mfma", "-mf16c"),
            "avx512.c": _AVX512,
            "avx512_bf16.c": (*_AVX512, "-mavx512bf16"),
        },
        "aarch64": {"neon.c": ()},
    },
)
MERGING = Library(
    "tarsia_merge",
    PACKAGE / "merge" / "kernels",
    ("tarsia_merge.c", "thresholds.c", "select.c", "portable.c", "../../quant/kernels/team.c"),
    {"x86_64": {"avx2.c": ("-mavx2", "-mfma"), "avx512.c": (*_AVX512, "-mprefer-vector-width=512")}},
)
SERVING = Library(
    "tarsia_serve",
    PACKAGE / "serve" / "kernels",
    ("tarsia_serve.c", "attend.c", "portable.c", "../../quant/kernels/team.c"),
    {"x86_64": {"avx2.c": ("-mavx2", "-mfma"), "avx512.c": (*_AVX512, "-mprefer-vector-width=512")}},
)
LIBRARIES = (FOUR_BITS, MERGING, SERVING)
"""Every library that is compiled, into a wheel too."""

_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


class BuildError(Exception):
    """The kernel can not be compiled: what was called, and what the compiler said."""


def machine() -> str:
    """This machine, as `SETS` spells it."""
    name = platform.machine().lower()
    return _ALIASES.get(name, name)


def compiler() -> list[str] | None:
    """The C compiler's command: $CC, which may carry options, else the first of cc, gcc and clang that there is."""
    command = shlex.split(os.environ.get("CC", ""))
    if command:
        return command if shutil.which(command[0]) else None
    return next(([path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def compile_library(library: Library, target: Path, machine: str, cc: Sequence[str]) -> Path:
    """Compile ``library`` for ``machine`` with the command ``cc`` into the file ``target``.

    The library appears whole or not at all. Raises BuildError with the compiler's own words.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    include = [f"-I{folder}" for folder in library.folders()]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as temporary:
        built = Path(temporary)
        stamp = built / "digest.c"
        said = f'const char *{library.name}_digest(void) {{ return "{library.digest(machine)}"; }}\n'
        stamp.write_text(said, encoding="utf8")
        objects = []
        for source, flags in {**library.sources(machine), stamp: ()}.items():
            objects.append(str(built / f"{source.stem}.o"))
            common = [*COMMON, *library.defines(machine), *include]
            _call([*cc, *common, *flags, "-c", str(source), "-o", objects[-1]])
        made = built / target.name
        _call([*cc, "-shared", *objects, "-lm", "-o", str(made)])
        os.replace(made, target)
    return target


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr.strip()}")


def build(library: Library) -> Path:
    """Compile for this machine, in place. Raises BuildError."""
    cc = compiler()
    if cc is None:
        asked = os.environ.get("CC")
        raise BuildError(f"there is no C compiler: {asked or 'cc, gcc, clang'} not found")
    return compile_library(library, library.path, machine(), cc)


def main() -> int:
    """Build all, say where each lies; 1 where one can not be built."""
    try:
        for library in LIBRARIES:
            print(build(library))
    except BuildError as error:
        print(f"{library.name} was not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
