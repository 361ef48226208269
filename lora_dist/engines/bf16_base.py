"""Keeps the frozen base in bf16 and the trained parameters in fp32, without autocast (`--base_dtype bfloat16`)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.engines.half_precision import compute_in
from lora_dist.errors import UserError
from lora_dist.model.lora.parameter_names import is_head, lora_layer_of
from lora_dist.model.lora.trainable import clear_cached


def cast_base(model: nn.Module, heads: Sequence[str]) -> None:
    """Casts all weights but those of LoRA and the heads to bf16, in place.

    The model then computes in bf16, with LoRA's matrices cast for each product, and its heads in fp32.

    Args:
        model: an adapted model, before an engine wraps it.
        heads: names of the modules that train in full.

    Raises:
        UserError: layers of the base train as well.
    """
    compute_in(model, "bf16")
    for name, parameter in model.named_parameters():
        if is_head(name, heads) or lora_layer_of(name) is not None:
            continue
        if parameter.requires_grad:
            raise UserError(f"--base_dtype bfloat16: {name} of the base trains as well. Use --mixed_precision bf16")
        parameter.data = parameter.data.to(torch.bfloat16)
    clear_cached(model)
    for name, module in model.named_modules():
        if is_head(name, heads) and next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(_in_its_dtype)


def _in_its_dtype(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Casts the input of a module to the dtype of its own parameters."""
    dtype = next(module.parameters(recurse=False)).dtype
    return tuple(one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one for one in inputs)


@torch.no_grad()
def require_bf16_forward(model: nn.Module, pixel_values: Tensor) -> None:
    """Classifies images [B, 3, H, W], on the device of the model, whose base is in bf16.

    Raises:
        UserError: the model does not run, for example because it has constants in fp32 (CSATv2 of timm), or because
            layers of its base follow one that trains in fp32.
    """
    try:
        with torch.compiler.set_stance("force_eager"):
            model.eval()(pixel_values=pixel_values)
    except RuntimeError as error:
        raise UserError(
            f"--base_dtype bfloat16: the model does not run with its base in bf16 and what trains in fp32 ({error}). "
            f"Use --mixed_precision bf16 instead"
        ) from error
    clear_cached(model)
