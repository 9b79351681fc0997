"""Compile the kernel: ``python -m tarsia.quant.build``, and the same from the hook that makes a wheel.

One source for each instruction set, each compiled with its own flags, linked into one shared library beside them.
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
from pathlib import Path

KERNELS = Path(__file__).resolve().parent / "kernels"
LIBRARY = "libtarsia4.so"

# No fused multiply-add but where it is written: bits are to be equal on every processor.
COMMON = ("-std=gnu11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra")

# no more than tarsia4_supported asks the processor for
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
EVERYWHERE: Mapping[str, tuple[str, ...]] = {"tarsia4.c": (), "team.c": (), "portable.c": ()}
SETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx2.c": ("-mavx2", "-mfma", "-mf16c"),
        "avx512.c": _AVX512,
        "avx512_bf16.c": (*_AVX512, "-mavx512bf16"),
    },
    "aarch64": {"neon.c": ()},
}
"""Machine: its sources besides those of every machine, and the flags of each."""

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


def sources(machine: str, folder: Path = KERNELS) -> dict[Path, tuple[str, ...]]:
    """Each source for ``machine``, with its own flags."""
    return {folder / name: flags for name, flags in {**EVERYWHERE, **SETS.get(machine, {})}.items()}


def digest(machine: str, folder: Path = KERNELS) -> str:
    """What the library of these sources and flags is known by, 16 hexadecimal digits."""
    of = hashlib.sha256(repr((COMMON, machine)).encode())
    for path, flags in sources(machine, folder).items():
        of.update(repr((path.name, flags)).encode() + path.read_bytes())
    for path in sorted(folder.glob("*.h")):
        of.update(path.name.encode() + path.read_bytes())
    return of.hexdigest()[:16]


def fresh(library: Path, folder: Path = KERNELS) -> bool:
    """Whether ``library`` was compiled for this machine from the sources that lie in ``folder``, where any do."""
    if not (folder / "tarsia4.c").exists():
        return True
    return digest(machine(), folder).encode() in library.read_bytes()


def compile_library(target: Path, machine: str, cc: Sequence[str], folder: Path = KERNELS) -> Path:
    """Compile the sources in ``folder`` for ``machine`` with the command ``cc`` into the shared library ``target``.

    The library appears whole or not at all. Raises BuildError with the compiler's own words.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as temporary:
        built = Path(temporary)
        stamp = built / "digest.c"
        stamp.write_text(
            f'const char *tarsia4_digest(void) {{ return "{digest(machine, folder)}"; }}\n', encoding="utf8"
        )
        objects = []
        for source, flags in {**sources(machine, folder), stamp: ()}.items():
            objects.append(str(built / f"{source.stem}.o"))
            _call([*cc, *COMMON, *_defines(machine), *flags, "-c", str(source), "-o", objects[-1]])
        made = built / target.name
        _call([*cc, "-shared", *objects, "-lm", "-o", str(made)])
        os.replace(made, target)
    return target


def _defines(machine: str) -> list[str]:
    """What tells the dispatcher, tarsia4.c, which sources there are: -DTARSIA4_HAVE_AVX2 and so on."""
    return [f"-DTARSIA4_HAVE_{Path(name).stem.upper()}" for name in SETS.get(machine, {})]


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr.strip()}")


def build() -> Path:
    """Compile for this machine, in place. Raises BuildError."""
    cc = compiler()
    if cc is None:
        asked = os.environ.get("CC")
        raise BuildError(f"there is no C compiler: {asked or 'cc, gcc, clang'} not found")
    return compile_library(KERNELS / LIBRARY, machine(), cc)


def main() -> int:
    """Build, say where it lies; 1 where it can not be built."""
    try:
        print(build())
    except BuildError as error:
        print(f"the kernel was not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
