"""LoRA's linear layer as one autograd function: same results as PEFT's, with fewer passes over memory."""

from types import MethodType
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear


def speed_up(model: nn.Module) -> None:
    """Replaces the `forward` of PEFT's linear LoRA layers; names, parameters, saving and merging stay PEFT's."""
    for module in model.modules():
        if type(module) is lora.Linear:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def forward(layer: lora.Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Computes `W x + c + s B A dropout(x)`: [..., in_features] to [..., out_features].

    Falls back to PEFT's `forward` for its further arguments and for layers that the function does not support.
    """
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else ""
    if args or kwargs or not _is_covered(layer, name, x):
        return lora.Linear.forward(layer, x, *args, **kwargs)
    base, down, up = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    tensors = [x, base.weight, base.bias, down, up]
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    dropout = layer.lora_dropout[name]
    rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return LoraLinear.apply(*tensors, layer.scaling[name], rate)


def _is_covered(layer: lora.Linear, name: str, x: Tensor) -> bool:
    """Whether a layer is plain LoRA on a frozen, unquantised linear layer whose weights are not sharded.

    The function calls none of the layers inside, so their hooks, parametrisations or own `forward` rule it out.
    """
    if (
        name not in layer.lora_A
        or name in layer.lora_variant
        or layer.disable_adapters
        or layer.merged
        or not all(_is_plain(inside) for inside in (layer.base_layer, layer.lora_A[name], layer.lora_B[name]))
        or _is_hooked(layer.lora_dropout[name])
        or any(parameter.requires_grad for parameter in layer.base_layer.parameters())
        or layer.lora_B[name].bias is not None
        or torch.compiler.is_compiling()  # fuses PEFT's own layer
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    weights = [layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight]
    # ZeRO-3 (`ds_id`) and tensor parallelism gather a weight only when its module is called.
    if any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in weights):
        return False
    if torch.is_autocast_enabled(x.device.type):
        return x.is_floating_point()
    # With a base in half precision, A and B may be in fp32, and are cast as under autocast.
    return weights[0].dtype == x.dtype and all(weight.dtype in (x.dtype, torch.float32) for weight in weights[1:])


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and not _is_hooked(layer)


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


class LoraLinear(torch.autograd.Function):
    """Saves the input (shared by layers), `hidden` [rows, r] and the dropout mask for the backward pass.

    A backward pass that is itself differentiated (`create_graph`) recomputes `hidden` from the inputs.
    Without dropout, `s B A` is added to the weights instead of the output (`folds`) if the weights are fewer.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float, rate: float
    ) -> Tensor:
        """Returns x W^T + bias + scaling * dropout(x) A^T B^T [..., out], of x [..., in], A [r, in] and B [out, r].

        Args:
            weight: W [out, in].
            bias: [out] or None.
            down: A.
            up: B.
            scaling: of the update.
        """
        rows = x.reshape(-1, x.shape[-1])
        kept, keep = draw_mask(rows, rate)
        # Dropout's factor 1/keep is part of the scaling, which applies to `r` columns only.
        ctx.scaling = scaling / keep if keep else 0.0
        # In half precision, the sum would round away the small update.
        ctx.folds = kept is None and rows.dtype == torch.float32 and rows.shape[0] > rows.shape[1]
        hidden = _masked(rows, _as_factor(kept, rows.dtype)) @ down.t()
        factor = weight.addmm(up, down, alpha=ctx.scaling) if ctx.folds else weight
        output = linear(rows, factor, bias)
        if not ctx.folds:
            output.addmm_(hidden, up.t(), alpha=ctx.scaling)
        ctx.save_for_backward(x, kept, weight, hidden, down, up)
        # A view made in a function cannot be modified in place afterwards.
        return torch.ops.aten._unsafe_view(output, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, weight, hidden, down, up = ctx.saved_tensors
        rows, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        if torch.is_grad_enabled():
            hidden = _masked(rows, _as_factor(kept, rows.dtype)) @ down.t()
        of_hidden = (gradient @ up).mul_(ctx.scaling)
        of_up = (hidden.t() @ gradient).mul_(ctx.scaling).t()
        mask = _as_factor(kept, rows.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            # Recomputed: saving the sum would keep memory that FSDP frees between the passes.
            of_x = gradient @ (weight.addmm(up, down, alpha=ctx.scaling) if ctx.folds else weight)
            if mask is not None:
                of_x.addcmul_(of_hidden @ down, mask)
            elif not ctx.folds:
                of_x.addmm_(of_hidden, down)
            of_x = of_x.view(x.shape)
        of_down = of_hidden.t() @ _masked(rows, mask)
        return of_x, None, None, of_down, of_up, None, None


def draw_mask(rows: Tensor, rate: float) -> tuple[Tensor | None, float]:
    """Draws the elements that dropout keeps, one byte each, and returns their probability."""
    keep = 1 - rate
    if rate == 0:
        return None, keep
    if rows.device.type != "cpu":
        return torch.empty_like(rows, dtype=torch.bool).bernoulli_(keep), keep
    values = 256 * keep
    if not 1 <= values <= 255 or rows.shape[1] % 8:
        return torch.empty_like(rows, dtype=torch.uint8).bernoulli_(keep), keep
    # On a CPU, `bernoulli_` takes as long as the matrix product; comparing random bytes, drawn eight at a time, takes
    # a tenth. The threshold of each row is rounded up or down at random, which makes the probability exact.
    last = torch.empty(rows.shape[0], 1, dtype=torch.int8).bernoulli_(values % 1).add_(int(values) - 129)
    words = torch.empty(rows.shape[0], rows.shape[1] // 8, dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.int8).le_(last), keep


def _as_factor(kept: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask in the dtype of its other factor, which takes half the time on a CPU."""
    return kept if kept is None or kept.dtype == torch.bool else kept.to(dtype)


def _masked(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows times mask; overwrites a floating-point mask, to save memory, unless it is needed for a derivative."""
    if mask is None:
        return rows
    return rows * mask if mask.dtype == torch.bool or torch.is_grad_enabled() else mask.mul_(rows)
