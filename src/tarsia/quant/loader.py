"""A compiled library: found, checked, loaded; which of its instruction sets runs, on whose threads, and why.

`Interface` is what a library promises; `find` gives what of it runs here. Where nothing does, that is a `Status`, for
``tarsia doctor`` and the log, and the caller's slow reference runs.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tarsia.core.errors import ConfigError
from tarsia.quant import build

REBUILD = "python -m tarsia.quant.build (it needs gcc or clang), or install a wheel for this machine"
_RUNTIME = re.compile(r"/\S*/lib(?:gomp|iomp5|omp)(?:-\w+)?\.so\S*")
_TEAM = struct.Struct("Pi4x")  # tarsia4_team


@dataclass(frozen=True, slots=True)
class Interface:
    """A library and how it is spoken to: its binary interface, its functions, its instruction sets."""

    library: build.Library
    abi: int
    signatures: Mapping[str, list[Any]]
    """The arguments of each function, by what its name has after that of the library; each returns an int."""
    sets: Mapping[str, int]
    """The number of each instruction set."""
    best_first: tuple[str, ...]
    variable: str
    """What in the environment forces one of ``sets``, or ``reference``."""
    probe: Path | None = None
    """What tries, in a process of its own, an instruction set that this processor does not name."""

    @property
    def choices(self) -> tuple[str, ...]:
        """What ``variable`` may say."""
        return ("reference", *self.sets)


@dataclass(frozen=True, slots=True)
class Status:
    """What runs and why, in one sentence; ``do`` says what to do where it is not the best that this machine has.

    ``refused``: nothing runs, for what is forced is not there, and each use raises ConfigError.
    """

    text: str
    do: str | None = None
    refused: bool = False

    def __str__(self) -> str:
        return self.text


class Team:
    """The threads of torch's own OpenMP runtime, as the libraries take them; ``parallel``: its entry, or 0."""

    def __init__(self, parallel: int) -> None:
        self._parallel = parallel
        self._packed: dict[int, bytes] = {}

    def __call__(self) -> bytes:
        threads = torch.get_num_threads()
        team = self._packed.get(threads)
        if team is None:
            team = self._packed[threads] = _TEAM.pack(self._parallel, threads)
        return team


@dataclass(frozen=True, slots=True)
class Found:
    """A library that is loaded, the instruction set of it that runs, and the threads it runs on."""

    handle: ctypes.CDLL
    name: str
    parallel: int


def find(interface: Interface, path: Path, forced: str) -> tuple[Found | None, Status]:
    """What of the library at ``path`` runs here. Raises ConfigError where ``forced`` does not."""
    variable = interface.variable
    if forced == "reference":
        return None, Status(f"the slow reference: {variable} asks for it")
    loaded = load(interface, path)
    there = [] if isinstance(loaded, str) else [name for name in interface.best_first if _runs(interface, loaded, name)]
    allowed = ", ".join([*there, "reference"])
    if forced and forced not in interface.sets:
        raise ConfigError(f"{variable} names no kernel.", given=forced, allowed=allowed)
    if isinstance(loaded, str):
        if forced:
            raise ConfigError(f"{variable} forces a kernel, but {loaded}.", given=forced, allowed=allowed, do=REBUILD)
        return None, Status(f"the slow reference, for {loaded}", REBUILD)
    if forced and forced not in there and not executes(interface, path, forced):
        raise ConfigError(f"{variable} forces a kernel that does not run here.", given=forced, allowed=allowed)
    if not there:
        return None, Status(f"the slow reference, for {path} has no instruction set that runs here", REBUILD)
    name = forced or there[0]
    parallel, whose = threads(maps())
    why = f"{variable} asks for it" if forced else f"of {', '.join(reversed(there))}"
    text, found = f"{name} ({why}), {whose}", Found(loaded, name, parallel)
    if not interface.library.at(path.parent).fresh():
        return found, Status(f"{text}; {path} was built of other sources", REBUILD)
    return found, Status(text)


def status(interface: Interface) -> Status:
    """What runs here and why."""
    try:
        return find(interface, interface.library.path, os.environ.get(interface.variable, ""))[1]
    except ConfigError as error:
        do = f"set {interface.variable} to one of {error.allowed}, or unset it"
        do += f"; or {error.do}" if error.do else ""
        return Status(f"none: {error.what.removesuffix('.')}: {error.given}", do, True)


def function(interface: Interface, handle: ctypes.CDLL, name: str) -> Any:
    """A function of the library, by what its name has after that of the library."""
    return getattr(handle, f"{interface.library.name}_{name}")


def load(interface: Interface, path: Path) -> ctypes.CDLL | str:
    """The library at ``path`` with its functions declared, or why it is not used."""
    if not path.is_file():
        return f"no kernel is compiled ({path} is missing)"
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the kernel does not load on this machine ({error})"
    try:
        for name, arguments in {"abi": [], "supported": [ctypes.c_int], **interface.signatures}.items():
            of = function(interface, handle, name)
            of.argtypes, of.restype = arguments, ctypes.c_int
    except AttributeError as error:
        return f"{path} is another library ({error})"
    if (abi := function(interface, handle, "abi")()) != interface.abi:
        return f"{path} has the binary interface {abi}, and {interface.abi} is spoken here"
    return handle


def _runs(interface: Interface, handle: ctypes.CDLL, name: str) -> bool:
    return bool(function(interface, handle, "supported")(interface.sets[name]))


def executes(interface: Interface, path: Path, name: str) -> bool:
    """Whether this processor runs instructions that it does not name: tried in a process of its own, which may die."""
    if interface.probe is None:
        return False
    tried = [sys.executable, str(interface.probe), str(path), str(interface.sets[name])]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


def maps() -> str:
    """The files that this process has mapped, where the system tells."""
    path = Path("/proc/self/maps")
    return path.read_text(encoding="utf8", errors="replace") if path.exists() else ""


def threads(maps: str) -> tuple[int, str]:
    """The address of GOMP_parallel in the OpenMP runtime that torch has loaded (0: none), and words for it."""
    home = str(Path(torch.__file__).parents[1])
    for path in sorted(set(_RUNTIME.findall(maps)), key=lambda path: (not path.startswith(home), path)):
        try:
            # only what is loaded already: a second runtime's threads would spin against torch's
            runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            address = ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue  # not loaded after all, or a runtime without GNU's entry: the next, or this thread alone, said
        if address:
            count = torch.get_num_threads()
            return address, f"on {count} thread{'s' * (count > 1)} of torch's {Path(path).name}"
    return 0, "on one thread: torch has loaded no OpenMP runtime that can be asked"
