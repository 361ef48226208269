"""Heat maps that explain a class: the gradient of its logit at the last feature map before pooling."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lora_dist.errors import UserError
from lora_dist.model.lora.adapters import base_of

MOST_PREFIX_TOKENS = 16
"""Class and register tokens that may come before those of the patches."""
_NUMBERS_OF_QUERIES = ("num_output_groups", "num_latents")
"""Settings of GroupViT and Perceiver, whose tokens collect patches from the whole image."""


def heat_maps(model: nn.Module, pixel_values: Tensor, classes: Sequence[int] | None = None) -> Tensor:
    """Returns how much each part of an image speaks for its class.

    This is Grad-CAM (https://arxiv.org/abs/1610.02391): the positive part of the channels of a feature map, each
    weighted by the mean gradient of the logit at it. The feature map is the output of the last block of layers whose
    positions all have a gradient. With a class token, that is the block before the last one. In a model without such
    blocks, it is the output of any module.

    Args:
        model: a classifier in evaluation mode.
        pixel_values: inputs [B, 3, H, W] on its device.
        classes: number of the class of each image. Default: the predicted class.

    Returns:
        Maps [B, H, W] from 0 to 1, interpolated bilinearly; all 0 where nothing speaks for the class.

    Raises:
        UserError: no block of the model has a feature map.
    """
    config = getattr(base_of(model), "config", None)
    backbone = getattr(config, "backbone_config", config)
    if any(hasattr(backbone, number) for number in _NUMBERS_OF_QUERIES):
        raise UserError(
            f"{getattr(backbone, 'model_type', 'the model')} has no feature map to explain its predictions by: its "
            f"last tokens are learned queries, not places in the image"
        )
    for modules in (_blocks(model), list(model.modules())):
        found = _heat_maps(model, modules, pixel_values, classes)
        if found is not None:
            return found
    raise UserError(f"{type(base_of(model)).__name__} has no feature map to explain its predictions by")


def _heat_maps(
    model: nn.Module, modules: Sequence[nn.Module], pixel_values: Tensor, classes: Sequence[int] | None
) -> Tensor | None:
    """The maps, of the output of one of these modules; None if none of them has a feature map."""
    size = (int(pixel_values.shape[2]), int(pixel_values.shape[3]))
    with torch.enable_grad(), _outputs_of(modules) as outputs:
        # The parameters of a model for prediction need no gradient.
        logits = model(pixel_values=pixel_values.detach().clone().requires_grad_()).logits
        chosen = logits.argmax(dim=-1) if classes is None else torch.tensor(classes, device=logits.device)
        total = logits.gather(-1, chosen[:, None]).sum()
        features = [output for output in outputs if len(output) == len(pixel_values) and _grid(output, size)]
        gradients: Sequence[Tensor | None] = []
        if features:
            gradients = torch.autograd.grad(total, features, allow_unused=True)
    for feature, gradient in reversed(list(zip(features, gradients, strict=True))):
        if gradient is None:
            continue
        steep, values = (_as_maps(tensor.detach(), size) for tensor in (gradient, feature))
        if (steep != 0).any(dim=1).flatten(1).float().mean() > 0.5:
            weights = steep.mean(dim=(2, 3), keepdim=True)
            found = (weights * values).sum(dim=1, keepdim=True).relu().float().nan_to_num()
            found = interpolate(found, size, mode="bilinear")[:, 0]
            return (found / found.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)).cpu()
    return None


def _blocks(model: nn.Module) -> list[nn.Module]:
    """All modules in lists and sequences of a model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    return list(dict.fromkeys(block for modules in lists for block in modules))


@contextmanager
def _outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects the outputs of modules, in the order of computation.

    Forward passes without gradients, such as those of other threads, are left out.
    """
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            outputs.append(tensor)

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(keep))
        yield outputs


def _grid(features: Tensor, size: tuple[int, int]) -> tuple[int, int, int] | None:
    """Height and width of a feature map for images of a size, and the tokens before it; None if it is none.

    Feature maps are [B, C, h, w], [B, h, w, C] or tokens [B, prefix + h * w, C], with several positions.
    """
    height, width = size
    if features.dim() == 4:
        h, w = features.shape[1:3] if _is_channels_last(features, size) else features.shape[2:]
        return (int(h), int(w), 0) if h * w > 1 else None
    if features.dim() != 3:
        return None
    found: list[tuple[int, int, int]] = []
    for prefix in range(min(MOST_PREFIX_TOKENS + 1, features.shape[1])):
        positions = features.shape[1] - prefix
        h = math.isqrt(positions * height // width) or 1
        found += [
            (rows, positions // rows, prefix)
            for rows in (h, h + 1)
            if positions > 1 and positions % rows == 0 and _is_same_shape(rows, positions // rows, size)
        ]
    # 26 tokens of 32 x 32 pixels are 10 and 4 x 4 rather than 1 and 5 x 5.
    return next((grid for grid in found if _has_whole_patches(grid, size)), found[0] if found else None)


def _has_whole_patches(grid: tuple[int, int, int], size: tuple[int, int]) -> bool:
    """Whether square patches of whole pixels make this grid of an image."""
    (rows, columns, _), (height, width) = grid, size
    return height % rows == 0 and width % columns == 0 and height // rows == width // columns


def _is_same_shape(rows: int, columns: int, size: tuple[int, int]) -> bool:
    """Whether a grid comes from an image by patches of one size: the same aspect up to one position."""
    height, width = size
    return abs(rows - columns * height / width) < 1 and abs(columns - rows * width / height) < 1


def _is_channels_last(features: Tensor, size: tuple[int, int]) -> bool:
    first, middle, last = (int(number) for number in features.shape[1:])
    return _is_same_shape(first, middle, size) and not _is_same_shape(middle, last, size)


def _as_maps(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Features as [B, C, h, w]."""
    grid = _grid(features, size)
    assert grid is not None
    rows, columns, prefix = grid
    if features.dim() == 4:
        return features.permute(0, 3, 1, 2) if _is_channels_last(features, size) else features
    return features[:, prefix:].transpose(1, 2).unflatten(2, (rows, columns))
