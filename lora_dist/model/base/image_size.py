"""Gives a model and its image processor another input size (`--image_size`)."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lora_dist.data.pixels.transforms import output_size
from lora_dist.errors import UserError
from lora_dist.model.base import timm_image_size
from lora_dist.model.base.without_data import outputs_without_data

Size = tuple[int, int]
_MOST_PREFIX_TOKENS = 16


def resize_model(model: Any, size: Size) -> Any:
    """Returns the model for images of height and width `size`, as if it had been trained with them.

    Position embeddings are interpolated as the model itself does it, else bicubically, and tables of relative positions
    bilinearly, as in BEiT. All other weights are shared with `model`. A model that takes only square images, but
    interpolates its embeddings in each forward pass, stays as it is.

    Raises:
        UserError: the model cannot take such images.
    """
    if model.config.model_type == timm_image_size.MODEL_TYPE:
        return _resized_timm(model, size)
    before = configured_size(model.config)
    if before in (None, size):
        return _require_images(model, model, size)
    try:
        return _require_images(_rebuilt(model, size), model, size)
    except UserError as error:
        try:
            return _require_images(model, model, size)
        except UserError:
            raise error from error.__cause__


def _resized_timm(model: Any, size: Size) -> Any:
    try:
        resized = _require_images(model, model, size)
    except UserError:
        # Not a convolutional network: it is built for one size.
        with _as_user_error(model, size):
            resized = timm_image_size.rebuilt(model, size)
        _require_images(resized, model, size)
    timm_image_size.record_size(resized.config, size)
    return resized


def _require_images(resized: Any, model: Any, size: Size) -> Any:
    """Returns `resized` if it computes logits of images of this size; tried without data where the model allows it."""
    with suppress(Exception):
        outputs_without_data(type(resized), resized.config, size)
        return resized
    with _as_user_error(model, size), torch.no_grad():
        resized.eval()(pixel_values=torch.zeros(1, 3, *size))
    return resized


@contextmanager
def _as_user_error(model: Any, size: Size) -> Iterator[None]:
    """Converts exceptions: each model has its own for a size that it does not take."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        name = getattr(model.config, "architecture", None) or type(getattr(model, "backbone", model)).__name__
        first, _, rest = str(error).strip().partition("\n")
        # torch lists what does not fit on the lines below a heading.
        reason = f"{first} {rest.strip().splitlines()[0]}" if first.endswith(":") and rest.strip() else first
        reason = reason.rstrip(".")
        if isinstance(error, TypeError) and size[0] != size[1]:
            reason = "its configuration has one number for both"
        advice = "" if size[0] == size[1] else ". It may take square ones"
        raise UserError(
            f"--image_size: {name} cannot take images of {_text(size)} (height x width): {reason}{advice}"
        ) from error


def resize_processor(processor: Any, size: Size) -> Any:
    """Returns a processor that makes images of height and width `size`, with the same margin around a center crop.

    Raises:
        UserError: the processor has no such settings.
    """
    before = output_size(processor)
    if before == size:
        return processor
    if hasattr(processor, "data_config"):
        return timm_image_size.resized_processor(processor, size)
    content = processor.to_dict()
    scales = size[0] / before[0], size[1] / before[1]
    given = {name: value for name, value in dict(content.get("size") or {}).items() if value is not None}
    edge = given.get("shortest_edge")
    if edge and scales[0] == scales[1]:
        given = {"shortest_edge": round(edge * scales[0])}
    else:
        height, width = given.get("height", edge), given.get("width", edge)
        if height and width:
            given = {"height": round(height * scales[0]), "width": round(width * scales[1])}
    content["size"] = given
    if content.get("crop_size"):
        content["crop_size"] = {"height": size[0], "width": size[1]}
    try:
        resized = type(processor).from_dict(content)
        after = output_size(resized)
    except (UserError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _cannot_resize(processor, size) from error
    if after != size:
        raise _cannot_resize(processor, size)
    return resized


def _cannot_resize(processor: Any, size: Size) -> UserError:
    advice = "" if size[0] == size[1] else ". It may make square ones"
    return UserError(
        f"--image_size: the image processor {type(processor).__name__} cannot make images of {_text(size)} "
        f"(height x width){advice}"
    )


def _configs(config: Any) -> Iterator[Any]:
    """Yields the model's configuration, then nested ones (backbone, vision) that may have an image size."""
    yield config
    for name in ("backbone_config", "vision_config"):
        if getattr(config, name, None) is not None:
            yield from _configs(getattr(config, name))


def configured_size(config: Any) -> Size | None:
    """Returns the height and width in a model's configuration, or None."""
    for part in _configs(config):
        found = getattr(part, "image_size", None)
        if found is not None:
            return (found, found) if isinstance(found, int) else (found[0], found[1])
    return None


def _with_image_size(config: Any, size: Size) -> Any:
    for part in _configs(config):
        found = getattr(part, "image_size", None)
        if found is not None:
            part.image_size = size[0] if size[0] == size[1] and isinstance(found, int) else list(size)
    return config


def _rebuilt(model: Any, size: Size) -> Any:
    """The model rebuilt for another image size; it shares the weights whose shape does not change."""
    with _as_user_error(model, size):
        config = _with_image_size(copy.deepcopy(model.config), size)
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in type(model)(config).state_dict().items()}
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            if tensor.shape == shapes[name]:
                state[name] = tensor
            elif tensor.is_floating_point():
                own = _interpolated_by_model(model, name, shapes[name], size)
                state[name] = _interpolated(name, tensor, shapes[name], model.config, size) if own is None else own
            # Tables of indices follow from the size; the new model makes them.
        resized = type(model).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    resized.name_or_path = resized.config.name_or_path = model.config.name_or_path
    resized.config._commit_hash = getattr(model.config, "_commit_hash", None)
    return resized


def _interpolated_by_model(model: Any, name: str, shape: torch.Size, size: Size) -> Tensor | None:
    """Position embeddings as the method `interpolate_pos_encoding` of their module gives them, if it has one."""
    # The module of the parameter, and the one around it if that is an `nn.Embedding`.
    for owner in (name.rpartition(".")[0], name.rpartition(".")[0].rpartition(".")[0]):
        interpolate_own = getattr(model.get_submodule(owner), "interpolate_pos_encoding", None)
        if interpolate_own is None:
            continue
        try:
            with torch.no_grad():
                return interpolate_own(torch.zeros(1, *shape[-2:]), *size).reshape(shape).clone()
        except (TypeError, RuntimeError, IndexError):
            # PVT's takes other arguments, and some take square images only.
            return None
    return None


def _strides(config: Any) -> set[int]:
    """Possible sizes of the patch of one position, in pixels."""
    patches = [getattr(part, "patch_size", None) for part in _configs(config)]
    return {2**power for power in range(7)} | {
        patch * 2**stage for patch in patches if isinstance(patch, int) for stage in range(5)
    }


def _interpolated(name: str, tensor: Tensor, shape: torch.Size, config: Any, size: Size) -> Tensor:
    """Resizes a tensor along the dimension that counts positions."""
    before, strides = configured_size(config), _strides(config)
    assert before is not None
    changed = [index for index, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)) if old != new]
    if len(changed) != 1 or "pos" not in name:
        raise ValueError(f"{name} of shape {list(tensor.shape)} cannot be interpolated to {list(shape)}")
    (axis,) = changed
    rows = tensor.movedim(axis, 0)
    if "relative" in name:
        old, new, extra = _relative_grids(len(rows), shape[axis], strides, before, size)
        grid, kept = rows[: len(rows) - extra], rows[len(rows) - extra :]
        parts = [_resized_grid(grid, old, new, "bilinear"), kept]
    else:
        old, new, extra = _grids(len(rows), shape[axis], strides, before, size)
        parts = [rows[:extra], _resized_grid(rows[extra:], old, new, "bicubic")]
    return torch.cat(parts).movedim(0, axis).contiguous()


def _grids(old: int, new: int, strides: set[int], before: Size, size: Size) -> tuple[Size, Size, int]:
    """Height and width of two grids of positions, and the number of tokens before them, from two lengths."""
    for extra in range(_MOST_PREFIX_TOKENS):
        for stride in sorted(strides):
            grids = _grid(before, stride), _grid(size, stride)
            if [math.prod(grid) + extra for grid in grids] == [old, new]:
                return *grids, extra
    raise ValueError(f"{old} position embeddings do not follow its image size {_text(before)}")


def _relative_grids(old: int, new: int, strides: set[int], before: Size, size: Size) -> tuple[Size, Size, int]:
    """The same for tables of relative positions, with the number of entries after them."""
    for stride in sorted(strides):
        grids = [(2 * height - 1, 2 * width - 1) for height, width in (_grid(before, stride), _grid(size, stride))]
        extras = {length - math.prod(grid) for length, grid in zip((old, new), grids, strict=True)}
        if len(extras) == 1 and 0 <= min(extras) < _MOST_PREFIX_TOKENS:
            return grids[0], grids[1], extras.pop()
    # Windows that are smaller than the configured ones, in models with a low resolution.
    edges = math.isqrt(old), math.isqrt(new)
    if edges[0] ** 2 == old and edges[1] ** 2 == new:
        return (edges[0], edges[0]), (edges[1], edges[1]), 0
    raise ValueError(f"a table of {old} relative positions does not follow its image size {_text(before)}")


def _grid(size: Size, stride: int) -> Size:
    return size[0] // stride, size[1] // stride


def _resized_grid(rows: Tensor, old: Size, new: Size, mode: str) -> Tensor:
    """Interpolates [h w, ...] to [h' w', ...]."""
    channels = rows.reshape(1, *old, -1).permute(0, 3, 1, 2)
    resized = interpolate(channels, size=new, mode=mode, align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(math.prod(new), *rows.shape[1:])


def _text(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
