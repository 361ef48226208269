"""The linear layer of LoRA as one autograd function: PEFT's numbers, in fewer passes over memory."""

from types import MethodType
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor


def speed_up(model: nn.Module) -> None:
    """Lets the linear LoRA layers of a model run as one function, wherever that covers what they are to compute.

    The layers stay PEFT's in all else: their names, parameters, saving and merging.
    """
    for module in model.modules():
        if type(module) is lora.Linear:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def forward(layer: lora.Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`W x + c + s B A dropout(x)`, as PEFT's layer gives it.

    Args:
        layer: PEFT's.
        x: [..., in_features].
        args: what PEFT's `forward` takes; it is left to it.
        kwargs: the same.

    Returns:
        [..., out_features].
    """
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else ""
    if args or kwargs or not _is_covered(layer, name, x):
        return lora.Linear.forward(layer, x, *args, **kwargs)
    base, down, up = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    tensors = [x, base.weight, base.bias, down, up]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    dropout = layer.lora_dropout[name]
    rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return _LoraLinear.apply(*tensors, layer.scaling[name], rate)


def _is_covered(layer: lora.Linear, name: str, x: Tensor) -> bool:
    """Whether a layer is plain LoRA on an unquantised linear layer whose weights are all here."""
    if (
        name not in layer.lora_A
        or name in layer.lora_variant
        or layer.disable_adapters
        or layer.merged
        or type(layer.base_layer) is not nn.Linear
        or any(parameter.requires_grad for parameter in layer.base_layer.parameters())
        or layer.lora_B[name].bias is not None
        or torch.compiler.is_compiling()  # which fuses PEFT's own layer
    ):
        return False
    weights = [layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight]
    # ZeRO-3 (`ds_id`) and tensor parallelism gather a weight when the module that owns it is called.
    if any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in weights):
        return False
    if torch.is_autocast_enabled(x.device.type):
        return x.is_floating_point()
    return all(weight.dtype == x.dtype for weight in weights)


class _LoraLinear(torch.autograd.Function):
    """The base is frozen. Kept for the backward pass: the input, which layers share, and what dropout drew."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float, rate: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        output = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        drawn, keep = _draw(rows, rate)
        # What dropout takes away, the others make up for: here in the one factor that is applied to `r` columns alone.
        ctx.scaling = scaling / keep
        mask = _mask(drawn, keep, rows.dtype)
        hidden = _masked(rows, mask) @ down.t()
        output.addmm_(hidden, up.t(), alpha=ctx.scaling)
        ctx.save_for_backward(rows, drawn, weight, hidden, down, up)
        ctx.shape, ctx.keep = x.shape, keep
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, drawn, weight, hidden, down, up = ctx.saved_tensors
        mask = _mask(drawn, ctx.keep, rows.dtype)
        gradient = gradient.reshape(-1, gradient.shape[-1])
        of_hidden = (gradient @ up).mul_(ctx.scaling)
        of_down = of_hidden.t() @ _masked(rows, mask)
        of_up = (hidden.t() @ gradient).mul_(ctx.scaling).t()
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ weight
            if mask is None:
                of_x.addmm_(of_hidden, down)
            else:
                of_x.addcmul_(of_hidden @ down, mask)
            of_x = of_x.view(ctx.shape)
        return of_x, None, None, of_down, of_up, None, None


def _draw(rows: Tensor, rate: float) -> tuple[Tensor | None, float]:
    """What decides which elements dropout keeps, from the device's generator, and the share of them."""
    if rate == 0:
        return None, 1.0
    if rows.device.type != "cpu":
        return torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - rate), 1 - rate
    # On a CPU `bernoulli_` takes as long as the layer's matrix product. 16 random bits an element, four at a draw,
    # take an eighth of that.
    words = torch.empty((rows.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = max(1, round((1 - rate) * 2**16))
    return words.view(torch.int16)[: rows.numel()].view_as(rows), kept / 2**16


def _mask(drawn: Tensor | None, keep: float, dtype: torch.dtype) -> Tensor | None:
    """Which elements are kept: 1 or 0, or bools."""
    if drawn is None or drawn.dtype == torch.bool:
        return drawn
    # In the type of what is masked, the product takes half the time.
    return torch.lt(drawn, round(keep * 2**16) - 2**15, out=torch.empty_like(drawn, dtype=dtype))


def _masked(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows * mask
