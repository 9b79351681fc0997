"""Checks of the machine: versions, processor, memory, threads, accelerators, compiler, base model."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module, metadata
from pathlib import Path

# Package: the least version that runs, and the one that is tested (constraints.txt).
PACKAGES: Mapping[str, tuple[str, str]] = {
    "torch": ("2.11", "2.13.0"),
    "transformers": ("5.17", "5.23.0"),
    "tokenizers": ("0", "0.23.3"),
    "safetensors": ("0.5", "0.8.0"),
    "huggingface-hub": ("0", "2.4.0"),
    "fsspec": ("0", "2026.9.0"),
    "datasets": ("5.0", "5.2.0"),
    "pyarrow": ("0", "26.0.1"),
    "numpy": ("2", "2.4.6"),
    "pillow": ("0", "13.0.0"),
    "jinja2": ("0", "3.1.6"),
    "pydantic": ("2.10", "2.14.3"),
    "PyYAML": ("0", "6.0.3"),
    "rich": ("0", "15.0.0"),
    "matplotlib": ("0", "3.11.2"),
    "fastapi": ("0", "0.165.0"),
    "uvicorn": ("0", "0.54.0"),
    "httpx": ("0", "0.28.1"),
    "prometheus-client": ("0", "0.26.0"),
    "llguidance": ("0", "1.9.1"),
}
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "avx512_vnni", "asimd", "bf16", "sve")
OPENMP = re.compile(r"\S*/lib(?:gomp|iomp5|omp)(?:-\w+)?\.(?:so|dylib)\S*")
GIB = 2**30


class State(StrEnum):
    """How a finding is to be taken."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``do`` says what to do where it is not well."""

    name: str
    state: State
    text: str
    do: str | None = None


def examine() -> Iterator[Finding]:
    """Every finding, in the order in which a person would look."""
    yield python(sys.version_info[:3])
    yield from packages(PACKAGES, installed(PACKAGES))
    yield processor(cpu_flags())
    yield bf16(bf16_here())
    yield threads(cores(), _torch_threads())
    yield openmp(loaded_libraries())
    yield memory(available_memory())
    yield disk(Path.cwd(), shutil.disk_usage(Path.cwd()).free)
    yield accelerators()
    yield compiler()
    yield kernel(*kernel_here())
    yield from gpu_kernel()
    yield merge_kernel()
    yield serve_kernel()
    yield base(Path(__file__).parents[1] / "base" / "mini-1")


def python(version: tuple[int, ...]) -> Finding:
    """Python's version."""
    text = f"{'.'.join(map(str, version))}, {platform.platform()}"
    if version < (3, 11):
        return Finding("python", State.FAIL, text, "install Python 3.11 or newer")
    return Finding("python", State.OK, text)


def installed(names: Iterable[str]) -> dict[str, str | None]:
    """Version of each distribution, or None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def packages(wanted: Mapping[str, tuple[str, str]], have: Mapping[str, str | None]) -> Iterator[Finding]:
    """Each dependency: present, new enough, and whether it is the version that is tested."""
    for name, (least, tested) in wanted.items():
        version = have[name]
        if version is None:
            yield Finding(name, State.FAIL, "not installed", f"pip install '{name}=={tested}'")
        elif _numbers(version) < _numbers(least):
            yield Finding(name, State.FAIL, f"{version}, older than {least}", f"pip install '{name}=={tested}'")
        elif version.partition("+")[0] != tested:
            yield Finding(name, State.WARN, f"{version}; {tested} is tested", f"pip install '{name}=={tested}'")
        else:
            yield Finding(name, State.OK, version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def cpu_flags() -> tuple[str, frozenset[str]]:
    """The processor's name, and its flags where the system tells them (Linux)."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf8") if path.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return (
        name[1] if name else platform.processor() or platform.machine(),
        frozenset(flags[1].split() if flags else ()),
    )


def processor(cpu: tuple[str, frozenset[str]]) -> Finding:
    """Name and the flags that matter here."""
    name, flags = cpu
    has = [flag for flag in FLAGS if flag in flags]
    if "avx2" in flags or "asimd" in flags or not flags:
        return Finding("processor", State.OK, f"{name} ({' '.join(has) or 'flags unknown'})")
    return Finding("processor", State.WARN, f"{name}, without avx2", "expect matrix products to be slow")


def bf16_here() -> tuple[bool, float] | None:
    """Whether training computes in bf16 here, and what a product on the processor takes of float32's time.

    None where torch can not be imported.
    """
    try:
        import torch

        from tarsia.adapter import native_bf16
    except ImportError:
        return None
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(384, 384, dtype=dtype)
        times = []
        for _ in range(6):
            began = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - began)
        best[dtype] = min(times)
    return native_bf16(), best[torch.bfloat16] / best[torch.float32]


def bf16(here: tuple[bool, float] | None) -> Finding:
    """What the precision "auto" of a recipe will choose, and what was seen."""
    if here is None:
        return Finding("bf16", State.FAIL, "torch can not be imported", "install torch")
    native, ratio = here
    chosen = "native, and used" if native else "not known to be native, so float32 is used"
    return Finding("bf16", State.OK, f"{chosen}; on the processor a product takes {ratio:.2f} of float32's time")


def cores() -> int:
    """Cores that this process may use: affinity, then the control group's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        most, _, period = quota.read_text(encoding="utf8").strip().partition(" ")
        if most != "max":
            count = min(count, max(1, int(most) // int(period)))
    return count


def _torch_threads() -> int | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.get_num_threads()


def threads(available: int, used: int | None) -> Finding:
    """Threads that torch uses against the cores that there are."""
    text = f"{available} cores, torch uses {used} threads"
    if used is None:
        return Finding("threads", State.FAIL, f"{available} cores, torch can not be imported", "install torch")
    if used > available:
        return Finding("threads", State.WARN, text, f"set OMP_NUM_THREADS={available}: threads beyond the cores wait")
    return Finding("threads", State.OK, text)


def loaded_libraries() -> str | None:
    """Names of the files mapped into this process once everything that Tarsia uses is imported."""
    for name in ("torch", "transformers", "numpy", "pyarrow", "PIL"):
        try:
            import_module(name)
        except ImportError:
            continue  # a package that is missing already has a finding of its own
    maps = Path("/proc/self/maps")
    return maps.read_text(encoding="utf8") if maps.exists() else None


def openmp(maps: str | None) -> Finding:
    """OpenMP runtimes in this process: two of them spin against each other."""
    if maps is None:
        return Finding("openmp", State.OK, "the system does not tell which runtimes are loaded")
    found = sorted(set(OPENMP.findall(maps)))
    if len(found) > 1:
        advice = "find what loads the second (often scikit-learn) and keep it out of the process"
        return Finding("openmp", State.WARN, f"{len(found)} runtimes: {', '.join(found)}", advice)
    return Finding("openmp", State.OK, found[0] if found else "no runtime loaded")


def available_memory() -> int | None:
    """Bytes that can still be had: of the machine, and of the control group's limit."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", info.read_text(encoding="utf8"), re.MULTILINE)
    found = int(match[1]) * 1024 if match else None
    limit, current = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and (most := limit.read_text(encoding="utf8").strip()) != "max":
        left = int(most) - int(current.read_text(encoding="utf8"))
        found = left if found is None else min(found, left)
    return found


def memory(available: int | None) -> Finding:
    """Memory left."""
    if available is None:
        return Finding("memory", State.OK, "the system does not tell how much is left")
    text = f"{available / GIB:.1f} GiB available"
    if available < 2 * GIB:
        return Finding("memory", State.WARN, text, "close other programs: the demo needs about 2 GiB")
    return Finding("memory", State.OK, text)


def disk(folder: Path, free: int) -> Finding:
    """Room for checkpoints where the command was called."""
    text = f"{free / GIB:.1f} GiB free in {folder}"
    if free < GIB // 4:
        return Finding("disk", State.FAIL, text, "free some space: checkpoints and adapters are written here")
    if free < 2 * GIB:
        return Finding("disk", State.WARN, text, "checkpoints of larger models will not fit")
    return Finding("disk", State.OK, text)


def accelerators() -> Finding:
    """CUDA devices, with their memory."""
    try:
        import torch
    except ImportError:
        return Finding("cuda", State.FAIL, "torch can not be imported", "install torch")
    if not torch.cuda.is_available():
        return Finding("cuda", State.OK, "no device; everything runs on the processor")
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Finding("cuda", State.OK, "; ".join(f"{d.name}, {d.total_memory / GIB:.0f} GiB" for d in devices))


def compiler() -> Finding:
    """A C compiler that compiles."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang"]
    path = next((found for name in names if (found := shutil.which(name))), None)
    advice = "install gcc or clang, or set CC: torch.compile and compiled kernels need one"
    if path is None:
        return Finding("compiler", State.WARN, f"no {' or '.join(names)}", advice)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.c")
        source.write_text("int main(void) { return 0; }\n", encoding="utf8")
        done = subprocess.run(
            [path, str(source), "-o", str(source.with_suffix(""))], capture_output=True, text=True, check=False
        )
    if done.returncode:
        return Finding("compiler", State.WARN, f"{path} fails: {done.stderr.strip().splitlines()[0]}", advice)
    return Finding("compiler", State.OK, path)


def kernel_here() -> tuple[str | None, str | None, bool]:
    """What runs where a weight is in 4 bits (None: torch is not there), what to do where it could be faster, and
    whether everything in 4 bits is refused."""
    try:
        from tarsia.quant import native
    except ImportError:
        return None, "install torch", True
    status = native.status()
    return status.text, status.do, status.refused


def kernel(text: str | None, do: str | None, refused: bool = False, name: str = "4-bit kernel") -> Finding:
    """What multiplies weights in 4 bits."""
    if text is None:
        return Finding(name, State.FAIL, "torch can not be imported", do)
    return Finding(name, State.FAIL if refused else State.OK if do is None else State.WARN, text, do)


def gpu_kernel() -> Iterator[Finding]:
    """The same on a GPU, where there is one."""
    try:
        import torch

        from tarsia.quant import cuda
    except ImportError:
        return  # the kernel's own finding says so
    if torch.cuda.is_available():
        status = cuda.status()
        yield kernel(status.text, status.do, status.refused, "4-bit on a GPU")


def merge_kernel() -> Finding:
    """What trims and elects where adapters are merged."""
    try:
        from tarsia.merge import kernel as merging
    except ImportError:
        return kernel(None, "install torch", name="merge kernel")
    status = merging.status()
    return kernel(status.text, status.do, status.refused, "merge kernel")


def serve_kernel() -> Finding:
    """What multiplies and attends where one base serves many adapters."""
    try:
        from tarsia.serve import kernel as serving
    except ImportError:
        return kernel(None, "install torch", name="serve kernel")
    status = serving.status()
    return kernel(status.text, status.do, status.refused, "serve kernel")


def base(folder: Path) -> Finding:
    """The embedded base model, with the digest of its weights."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return Finding(folder.name, State.FAIL, f"{weights} is missing", "install the package again")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    card = folder / "card.json"
    stated = json.loads(card.read_text(encoding="utf8")).get("sha256") if card.is_file() else "(no card)"
    if digest != stated:
        what = f"sha256 {digest[:16]}, but its card says {str(stated)[:16]}"
        return Finding(folder.name, State.FAIL, what, "install the package again")
    return Finding(folder.name, State.OK, f"{weights.stat().st_size / 1e6:.1f} MB, sha256 {digest[:16]}")
