"""Where the frozen part of a model's sight ends, and how its calls and outputs fall into pictures.

A *stage* is a module whose output depends on pictures and on frozen weights alone: the vision tower, or what
the projector makes of it. A *unit* is what a tower sees as one picture: a picture, a tile, or a picture's grid
of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from tarsia.adapter import Host
from tarsia.anatomy.table import type_of
from tarsia.core.errors import ConfigError, TrainingError
from tarsia.core.site import Component
from tarsia.core.slot import Slot

Call: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tower's arguments fall into units, and how the units' outputs make up its own.

    ``split`` gives for each unit the call that sees it alone. Outputs lie end to end along ``dim``; where
    ``nested``, the first two dimensions of the arguments are its units and those of the output again.
    """

    split: Callable[[Call], tuple[Call, ...]]
    dim: int = 0
    nested: bool = False

    def join(self, call: Call, parts: Sequence[Tensor]) -> Tensor:
        """One tensor of the units' outputs, freshly laid out."""
        whole = torch.cat(list(parts), self.dim)
        return whole.flatten(0, 1).unflatten(0, _tensors(call)[0].shape[:2]) if self.nested else whole


@dataclass(frozen=True, slots=True)
class Stage:
    """What is kept: of the module ``root``, ``fields`` of its output; or, where ``above`` is named, its output.

    ``about`` is what the outputs depend on besides tensors: configurations, as plain values. ``states`` is how many
    hidden states a tower's output lists, kept or not.
    """

    name: str
    root: str
    above: str | None
    fields: tuple[str, ...]
    layout: Layout
    about: Mapping[str, Any]
    states: int = 0

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules whose weights decide the output."""
        return (self.root,) if self.above is None else (self.root, self.above)


def _tensors(call: Call) -> list[Tensor]:
    return [value for value in (*call[0], *call[1].values()) if isinstance(value, Tensor)]


def _each(call: Call, count: int, take: Callable[[Tensor, int], Tensor]) -> tuple[Call, ...]:
    def one(value: Any, i: int) -> Any:
        return take(value, i) if isinstance(value, Tensor) else value

    args, keywords = call
    return tuple(
        (tuple(one(value, i) for value in args), {name: one(value, i) for name, value in keywords.items()})
        for i in range(count)
    )


def _flat(call: Call) -> tuple[Call, ...]:
    """[units, ...] in every tensor."""
    sizes = {len(tensor) for tensor in _tensors(call)}
    if len(sizes) != 1:
        raise _foreign(call)
    return _each(call, sizes.pop(), lambda tensor, i: tensor[i : i + 1])


def _nested(call: Call) -> tuple[Call, ...]:
    """[rows, pictures, ...] in every tensor (Mllama)."""
    sizes = {tuple(tensor.shape[:2]) for tensor in _tensors(call)}
    if len(sizes) != 1:
        raise _foreign(call)
    rows, pictures = sizes.pop()
    return _each(call, rows * pictures, lambda tensor, i: tensor.flatten(0, 1)[i : i + 1].unflatten(0, (1, 1)))


def _sized(call: Call) -> tuple[Call, ...]:
    """[pictures, 3, height, width] with zeros around, and each picture's own size (Pixtral).

    A picture is cut to its own size: how much is padded depends on the others of the batch.
    """
    args, keywords = call
    sizes = keywords.get("image_sizes")
    if len(args) != 1 or not isinstance(sizes, Tensor) or len(_tensors(call)) != 2 or len(sizes) != len(args[0]):
        raise _foreign(call)
    return tuple(
        ((args[0][i : i + 1, :, :height, :width],), {**keywords, "image_sizes": sizes[i : i + 1]})
        for i, (height, width) in enumerate(sizes.tolist())
    )


def _gridded(call: Call) -> tuple[Call, ...]:
    """[patches of all pictures, ...] and a grid (time, height, width) for each picture (Qwen-VL)."""
    args, keywords = call
    grids = keywords.get("grid_thw")
    if len(args) != 1 or not isinstance(grids, Tensor) or len(_tensors(call)) != 2:
        raise _foreign(call)
    lengths = grids.prod(-1).tolist()
    if sum(lengths) != len(args[0]):
        raise _foreign(call)
    parts = args[0].split(lengths)
    return tuple(((part,), {**keywords, "grid_thw": grids[i : i + 1]}) for i, part in enumerate(parts))


def _foreign(call: Call) -> TrainingError:
    shapes = [tuple(value.shape) for value in _tensors(call)]
    return TrainingError(
        "The vision tower is called in a way that does not tell its pictures apart.",
        given=f"tensors {shapes}, keywords {', '.join(call[1])}",
        do="leave features out of the recipe",
    )


_FLAT: Final = Layout(_flat)
_SIZED: Final = Layout(_sized, dim=1)
_NESTED: Final = Layout(_nested, nested=True)
_GRIDDED: Final = Layout(_gridded)

_PROJECTED: Final = ("llava", "llava_next", "llava_onevision", "paligemma", "gemma3", "internvl", "idefics3", "smolvlm")
"""Families whose tower sees a flat batch of units, each of which the projector then sees apart."""
_MERGED: Final = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""Families whose projector lies inside the tower's module."""


def _layout(host: Host) -> Layout:
    if host.anatomy.name in _MERGED:
        return _GRIDDED
    if host.anatomy.name == "mllama":
        return _NESTED
    return _SIZED if type_of(host.anatomy.config.vision_config) == "pixtral" else _FLAT


def _fields(host: Host) -> tuple[str, ...]:
    """The parts of the tower's output that the model reads."""
    config = host.anatomy.config
    if host.anatomy.name in _MERGED:
        deep = getattr(config.vision_config, "deepstack_visual_indexes", None) or ()
        return ("pooler_output", *(f"deepstack_features.{i}" for i in range(len(deep))))
    layers = getattr(config, "vision_feature_layer", None)
    if layers is None or (host.anatomy.name == "internvl" and layers == -1):
        return ("last_hidden_state",)
    asked = [layers] if isinstance(layers, int) else layers
    return tuple(dict.fromkeys(f"hidden_states.{layer % _states(host)}" for layer in asked))


def _states(host: Host) -> int:
    return int(getattr(host.anatomy.config.vision_config, "num_hidden_layers", 0)) + 1


def choose(host: Host) -> Stage:
    """The deepest stage of ``host``'s model as it is now that depends on nothing that is trained.

    Raises ConfigError, with what to do, where there is none: a part of the tower is patched or trained, or
    draws random numbers (dropout).
    """
    modules = dict(host.model.named_modules())
    root = _path(host, modules, Component.VISION)
    if root is None:
        raise ConfigError("The model has no vision tower of its own.", given=host.name, do="leave features out")
    above = _path(host, modules, Component.PROJECTOR) if host.anatomy.name in _PROJECTED else None
    why = _moving(modules[root])
    if why is not None:
        inside = host.anatomy.name in _MERGED
        raise ConfigError(
            "The vision tower's outputs can not be kept: they change while the run goes on.",
            given=f"{root}.{why}",
            do=f"leave features out, or vision{' and projector' if inside else ''} out of the parts' selections"
            " (a dropout in the tower: set it to 0 in the model's configuration)",
        )
    layout = _layout(host)
    owner = modules[root.rpartition(".")[0]]
    projects = above is not None and layout is _FLAT and hasattr(owner, "get_image_features")
    kept = above if projects and above is not None and _moving(modules[above]) is None else None
    config = host.anatomy.config.to_dict()
    about = config if kept is not None else config.get("vision_config", {})
    return Stage(
        name="vision tower" if kept is None else "projector",
        root=root,
        above=kept,
        fields=_fields(host),
        layout=layout,
        about={key: value for key, value in about.items() if key not in _ELSEWHERE},
        states=_states(host),
    )


_ELSEWHERE: Final = ("text_config", "dtype", "torch_dtype", "_name_or_path", "architectures", "transformers_version")
"""Keys of a configuration that say nothing of the pictures' features."""


def _path(host: Host, modules: Mapping[str, nn.Module], component: Component) -> str | None:
    prefixes = [part.prefix for part in host.anatomy.parts if part.component is component]
    paths = [path for prefix in prefixes if prefix for path in (f"model.{prefix}", prefix) if path in modules]
    return paths[0] if paths else None


def _moving(module: nn.Module) -> str | None:
    """What makes two calls of ``module`` with one input differ, as its path below it; None where nothing does."""
    for path, inner in module.named_modules():
        if isinstance(inner, Slot):
            return f"{path} (a patch)"
        for key, value in vars(inner).items():
            # F.dropout and scaled_dot_product_attention are given a number that a module keeps
            if ("drop" in key or (key == "p" and isinstance(inner, nn.Dropout))) and _above_zero(value):
                return f"{path}.{key} ({value:g})"
    return next((f"{path} (trained)" for path, p in module.named_parameters() if p.requires_grad), None)


def _above_zero(value: object) -> bool:
    return isinstance(value, float) and value > 0
