"""Prepares a model for DeepSpeed or FSDP2, which cast its parameters to bf16 or fp16 and use no autocast.

Neither casts buffers, and DeepSpeed casts positional arguments only.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compute_in(model: nn.Module, mixed_precision: str) -> None:
    """Casts the input and the constants of `model` to the dtype of its parameters, and runs its batch norms in fp32.

    Called before the engine wraps the model.

    Args:
        model: changed in place.
        mixed_precision: to which the engine casts the parameters; does nothing if that is `no`.
    """
    if mixed_precision not in DTYPES:
        return
    dtype = DTYPES[mixed_precision]

    def cast(_: nn.Module, positional: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return positional, named | {"pixel_values": named["pixel_values"].to(dtype)}

    model.register_forward_pre_hook(cast, with_kwargs=True)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = _Fp32BatchNorm(module)  # type: ignore[assignment, method-assign]
        elif next(module.parameters(), None) is not None:
            # Such as the table of coordinates of Swinv2. Rotary frequencies, in modules without parameters, stay fp32.
            for name in module._non_persistent_buffers_set & module._buffers.keys():
                buffer = module._buffers[name]
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.to(dtype)


class _Fp32BatchNorm:
    """The forward pass of a batch norm in fp32, the dtype of its running statistics, which it updates in place."""

    def __init__(self, norm: _BatchNorm) -> None:
        self._norm = norm
        # Without the hooks of the engine, which has gathered the weights of `norm` when its forward pass begins.
        self._without_hooks = copy.deepcopy(norm)

    def __call__(self, x: Tensor) -> Tensor:
        self._without_hooks.train(self._norm.training)
        tensors = dict(self._norm.named_parameters(recurse=False)) | dict(self._norm.named_buffers(recurse=False))
        in_fp32 = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        return functional_call(self._without_hooks, in_fp32, x.float()).to(x.dtype)
