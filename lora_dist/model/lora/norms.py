"""Finds the norm layers of a model, for `--train_norms`."""

from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lora_dist.errors import UserError
from lora_dist.model.base.head import is_in

_KINDS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _BatchNorm)


def norm_layers(model: nn.Module, heads: Sequence[str]) -> list[str]:
    """Returns the names of the norm layers outside the heads that have weights.

    Raises:
        UserError: there are none.
    """
    found = [name for name, module in model.named_modules() if _is_norm(module) and not is_in(name, heads)]
    if not found:
        raise UserError(f"--train_norms: {type(model).__name__} has no norm layer outside its head with weights")
    return found


def saves_norms(modules_to_save: Iterable[str], model: nn.Module, heads: Sequence[str]) -> bool:
    """Whether the `modules_to_save` of an adapter name norm layers outside the heads."""
    others = [name for name in modules_to_save if name not in heads]
    names = [name for name, module in model.named_modules() if _is_norm(module) and not is_in(name, heads)]
    return any(f".{norm}".endswith(f".{other}") for norm in names for other in others)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of torch, or one of a model's own: vectors of weights and no modules inside."""
    weights = list(module.parameters(recurse=False))
    if not weights or isinstance(module, _KINDS):
        return bool(weights)
    vectors = all(weight.ndim == 1 for weight in weights) and not any(True for _ in module.children())
    return vectors and "norm" in type(module).__name__.lower()
