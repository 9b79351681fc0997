"""4-bit weights as Transformers loads them: its own registration of quantisers, one tensor at a time.

A selected weight is read, rounded and let go before the next one is read. Layers keep their classes: only the
parameter is another.
"""

from __future__ import annotations

import re
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tarsia.adapter.four_bits import FourBits, Quantisation, choose
from tarsia.anatomy import Anatomy
from tarsia.core.errors import QuantError, TarsiaError
from tarsia.core.site import Kind
from tarsia.quant.rounding import lost, rounded
from tarsia.quant.tensor import Weight4

METHOD: Final = "tarsia4"


@register_quantization_config(METHOD)
class Tarsia4Config(QuantizationConfigMixin):  # type: ignore[misc]
    """What Transformers hands to the quantiser. ``found`` and ``refusal`` are what came of it."""

    def __init__(self, form: FourBits, anatomy: Anatomy) -> None:
        self.quant_method = METHOD
        self.form, self.anatomy = form, anatomy
        self.found: Quantisation | None = None
        self.refusal: TarsiaError | None = None

    def __deepcopy__(self, memo: object) -> Self:
        return self  # AutoModel copies its options, and what comes of the loading is to be found here

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "kind": self.form.kind, "nested": self.form.nested, "select": self.form.select}


@register_quantizer(METHOD)
class Tarsia4Quantizer(HfQuantizer):  # type: ignore[misc]
    """Rounds the selected weights of a checkpoint that is not quantised, as they are read."""

    requires_calibration = False
    quantization_config: Tarsia4Config

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config = self.quantization_config
        try:
            config.found = choose(config.form, model, tuple(config.anatomy.sites(model)))
        except TarsiaError as error:
            config.refusal = error
            raise
        self.names = config.found.names
        # in the dtype that they are stored in: how a weight is rounded does not depend on what it is computed in
        plan = model._get_dtype_plan
        stored = "^(?:" + "|".join(map(re.escape, sorted(self.names))) + ")$"
        model._get_dtype_plan = lambda dtype: {**plan(dtype), stored: None}
        if any(site.kind is Kind.EXPERT for site in config.found.sites):
            # the one that takes one expert's weight at a time
            model.set_experts_implementation("eager")

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        del model._get_dtype_plan
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return param_name in self.names

    def get_quantize_ops(self) -> ConversionOps:
        return Round(self)

    def is_serializable(self) -> bool:
        """No: ``tarsia quantise`` writes these."""
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class Round(ConversionOps):  # type: ignore[misc]
    """One weight of a checkpoint to 4 bits."""

    def __init__(self, hf_quantizer: Tarsia4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *, model: Any, full_layer_name: str, **_: Any) -> dict[str, Tensor]:
        """The rounded weight under its name. A refusal is kept, as Transformers makes a line of text of it."""
        config = self.hf_quantizer.quantization_config
        if config.refusal is not None:
            raise config.refusal  # what is refused once is not read to its end
        (given,) = input_dict.values()
        weight: Tensor = given[0] if isinstance(given, list) else given
        shape = model.get_parameter(full_layer_name)
        try:
            made = _rounded(weight, shape, config)
        except QuantError as error:
            config.refusal = error.about(full_layer_name)
            raise config.refusal from None
        assert config.found is not None
        config.found.losses[full_layer_name] = made[1]
        return {full_layer_name: nn.Parameter(made[0], requires_grad=False)}


def _rounded(weight: Tensor, shape: Tensor, config: Tarsia4Config) -> Any:
    if weight.shape != shape.shape:
        raise QuantError(
            "The checkpoint's tensor has not the shape that the configuration says.",
            given=tuple(weight.shape),
            allowed=tuple(shape.shape),
            do="fetch the checkpoint again, all of one version",
        )
    value = rounded(weight, config.form.scheme, shape.dtype)
    return Weight4(value), lost(weight, value)


def dtypes(model: nn.Module) -> set[torch.dtype]:
    """The floating-point dtypes of a model's parameters."""
    return {p.dtype for p in model.parameters() if p.is_floating_point()}
