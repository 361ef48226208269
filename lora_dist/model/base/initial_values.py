"""Finds weights and buffers to which the code of a model gives no values when `transformers` loads it.

`transformers` builds a model without memory and then calls its `_init_weights` for what the checkpoint lacks. Code that
was written for earlier releases relies on the constructors of torch's layers instead, and leaves what was in memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_dist.errors import UserError


@contextmanager
def marked_memory() -> Iterator[None]:
    """Makes torch fill new memory without values with NaN, or with the largest integer."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


@torch.no_grad()
def require_values(model: nn.Module, names: Sequence[str]) -> None:
    """Gives weights that are still marked the initial values of torch's layers.

    Args:
        model: loaded in `marked_memory`.
        names: parameters and buffers that the checkpoint lacks; those that no checkpoint has are added.

    Raises:
        UserError: a marked weight is of no layer of torch, or a buffer is marked.
    """
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        full = {name: f"{path}.{name}" if path else name for name in own}
        marked = [
            name
            for name in own
            if (full[name] in names or name in module._non_persistent_buffers_set) and _is_marked(own[name])
        ]
        if not marked:
            continue
        if not callable(reset := getattr(module, "reset_parameters", None)):
            name, kind = full[marked[0]], type(model).__name__
            if name in names:
                raise UserError(
                    f"the checkpoint lacks {name}, or has it in another shape, and the code of {kind} does not "
                    f"initialise it: take another checkpoint, or correct its config.json"
                )
            raise UserError(
                f"the code of {kind} gives {name} no values when transformers loads it: let its _init_weights compute "
                f"them, or take another base model"
            )
        kept = {name: tensor.clone() for name, tensor in own.items() if name not in marked}
        reset()
        for name, tensor in kept.items():
            own[name].copy_(tensor)


def _is_marked(tensor: Tensor) -> bool:
    if tensor.is_floating_point():
        return bool(tensor.isnan().any())
    return tensor.dtype == torch.int64 and tensor.numel() > 0 and bool((tensor == torch.iinfo(torch.int64).max).all())
