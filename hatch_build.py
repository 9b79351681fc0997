"""Called by hatchling when Tarsia is built or installed: compiles the kernels into a wheel for this machine."""

from __future__ import annotations

import sys
import sysconfig
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelHook(BuildHookInterface):
    """Without a compiler the wheel is one for every machine, and the slow references run: said here and by doctor."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        build = _load(Path(self.root, "src", "tarsia", "quant", "build.py"))
        try:
            libraries = [build.build(library) for library in build.LIBRARIES]
        except build.BuildError as error:
            self.app.display_warning(f"Without the kernels, whose place the slow references take: {error}")
            return
        if version == "editable":
            return  # it lies among the sources, which are what is installed
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"] += [str(path.relative_to(self.root)) for path in libraries]


def _load(path: Path) -> ModuleType:
    """The module in this file, not by its package: that needs torch, which a build has not."""
    spec = util.spec_from_file_location("tarsia_build", path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
