"""Finds the blocks of a backbone in the order of computation, and how far each parameter is from the head."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.errors import UserError
from lora_dist.model.base.head import is_in
from lora_dist.model.base.timm_image_size import MODEL_TYPE


def find_blocks(model: nn.Module, heads: Sequence[str], pixel_values: Tensor) -> list[str]:
    """Returns the names of a backbone's blocks, in the order in which it calls them.

    Blocks are the entries of numbered lists of modules. If entries of a list contain lists themselves, as the stages of
    Swin and ConvNeXt do, the blocks are the entries of the inner lists.

    Args:
        model: classifier of `transformers`, without adapters.
        heads: modules that do not belong to the backbone.
        pixel_values: any input [1, 3, H, W].

    Raises:
        UserError: the backbone has no such list.
    """
    return _blocks(model, heads, first_calls(model, pixel_values), "layers_to_transform")


def choose_blocks(blocks: Sequence[str], wanted: Sequence[int] | str) -> list[str]:
    """Returns the blocks that `layers_to_transform` names: by their numbers, or `last:N`.

    Raises:
        UserError: there are fewer blocks.
    """
    numbers = range(len(blocks))
    chosen = numbers[-int(wanted.removeprefix("last:")) :] if isinstance(wanted, str) else wanted
    most = int(wanted.removeprefix("last:")) - 1 if isinstance(wanted, str) else max(wanted)
    if most not in numbers:
        raise UserError(f"--layers_to_transform: the model has {len(blocks)} blocks, 0 to {len(blocks) - 1}")
    return [blocks[number] for number in chosen]


def steps_from_head(model: Any, heads: Sequence[str], pixel_values: Tensor) -> dict[str, int]:
    """Returns for each parameter how many layers it is from the head: 0 in the head, 1 in the last block and so on.

    The layers are those of timm's `param_groups_layer_decay`: everything before the first block is one layer, which is
    farthest from the head; what comes between two blocks belongs to the second of them, what follows the last block to
    this one. For a model of timm they come from timm itself, where it has them. Arguments as `find_blocks`.

    Raises:
        UserError: the backbone has no list of blocks.
    """
    if model.config.model_type == MODEL_TYPE and hasattr(model.timm_model, "group_matcher"):
        return _steps_in_timm(model)
    calls = first_calls(model, pixel_values)
    blocks = _blocks(model, heads, calls, "layer_decay")
    return {name: _steps(name, heads, blocks, calls) for name, _ in model.named_parameters()}


def _steps(name: str, heads: Sequence[str], blocks: Sequence[str], calls: Mapping[str, int]) -> int:
    if is_in(name, heads):
        return 0
    owner = name.rpartition(".")[0]
    while owner not in calls and owner not in blocks:
        owner = owner.rpartition(".")[0]
    own = next((index for index, block in enumerate(blocks) if is_in(owner, [block])), None)
    if own is None:
        if calls[owner] < calls[blocks[0]]:
            return len(blocks) + 1
        own = sum(calls[block] < calls[owner] for block in blocks[:-1])
    return len(blocks) - own


def _steps_in_timm(model: Any) -> dict[str, int]:
    from timm.models import group_parameters

    layers = group_parameters(model.timm_model, model.timm_model.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {f"timm_model.{name}": last - layer for name, layer in layers.items()}


@torch.no_grad()
def first_calls(model: nn.Module, pixel_values: Tensor) -> dict[str, int]:
    """Returns the modules that a forward pass calls, by name, with the order of their first calls.

    A model may use other modules by reading their weights. Arguments as `find_blocks`.
    """
    calls: dict[str, int] = {}

    def note(name: str) -> None:
        calls.setdefault(name, len(calls))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            # A value that a hook returns replaces the input of its module, so `note` returns none.
            hooks.enter_context(module.register_forward_pre_hook(lambda *_, name=name: note(name)))
        model(pixel_values=pixel_values)
    return calls


def layer_positions(model: nn.Module, pixel_values: Tensor) -> dict[str, int]:
    """Returns the linear layers and convolutions that features pass through, each with its number of positions.

    That is 1 after pooling, as in squeeze-and-excitation. Layers that a forward pass does not call are left out, and
    those that compute a table from constants, such as the relative positions of Swin v2. Arguments as `find_blocks`.
    """
    positions: dict[str, int] = {}

    def note(name: str, layer: Any, output: Tensor) -> None:
        if output.requires_grad:
            channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            positions[name] = max(positions.get(name, 1), output.numel() // (channels * len(pixel_values)))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                # A value that a hook returns replaces the output of its module, so `note` returns none.
                hook = module.register_forward_hook(lambda layer, _, output, name=name: note(name, layer, output))
                hooks.enter_context(hook)
        with torch.enable_grad(), _only_features_require_gradients(model):
            model(pixel_values=pixel_values.detach().clone().requires_grad_())
    return positions


@contextmanager
def _only_features_require_gradients(model: nn.Module) -> Iterator[None]:
    """Freezes the parameters of linear layers and convolutions; others, such as a class token, are features."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(not isinstance(module, nn.Linear | nn.Conv2d))
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def _blocks(model: nn.Module, heads: Sequence[str], calls: Mapping[str, int], flag: str) -> list[str]:
    outer = {name: entry for name, entry in _entries("", model) if not is_in(name, heads)}
    inner = [name for above, stage in outer.items() for name, _ in _entries(above, stage)]
    found = [name for name in inner or outer if name in calls]
    if not found:
        raise UserError(
            f"--{flag}: {type(model).__name__} has no numbered list of blocks, so the depth of its layers is unknown; "
            f"leave --{flag} out"
        )
    return sorted(found, key=lambda name: calls[name])


def _entries(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the entries of the outermost lists inside a module (or of itself) whose entries have modules inside."""
    children = dict(module.named_children())
    is_list = list(children) == [str(index) for index in range(len(children))]
    if is_list and any(_is_composite(child) for child in children.values()):
        yield from ((_join(prefix, name), child) for name, child in children.items() if _is_composite(child))
        return
    for name, child in children.items():
        yield from _entries(_join(prefix, name), child)


def _is_composite(module: nn.Module) -> bool:
    """Whether a module consists of other modules and has weights."""
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
