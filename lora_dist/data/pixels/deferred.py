"""Operations on the pixels of a batch that workers leave to the device: resize, erase and mix."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class DeferredOps(NamedTuple):
    """Operations that the device applies to the V views of a batch of B samples; None for those that do not apply.

    Attributes:
        erased: int64 [V, 4], an area of each view.
        partners: int64 [B], number of the view that is mixed into each sample. The views of the samples come first.
        pixel_lam: float32 [B], as in `Mixture`.
        cut_box: int64 [B, 4], as in `Mixture`.
        crop_sizes: int64 [V, 3], height and width of each crop in the padded pixels, and whether it is flipped. The
            device resizes the crops.
    """

    erased: Tensor | None = None
    partners: Tensor | None = None
    pixel_lam: Tensor | None = None
    cut_box: Tensor | None = None
    crop_sizes: Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "DeferredOps":
        """The same on `device`."""
        return DeferredOps(*(None if field is None else field.to(device, non_blocking=non_blocking) for field in self))


def combine(values: Tensor, deferred: DeferredOps) -> Tensor:
    """Erases areas of views [V, 3, H, W], which are model input, and applies mixup and CutMix to them.

    Returns:
        The samples [B, 3, H, W].
    """
    size = values.shape[-2:]
    if deferred.erased is not None:
        values = values.masked_fill(_mask(deferred.erased, size), 0.0)
    if deferred.partners is None or deferred.pixel_lam is None or deferred.cut_box is None:
        return values
    own, partners, pixel_lam = (
        values[: len(deferred.partners)],
        values[deferred.partners],
        deferred.pixel_lam[:, None, None, None],
    )
    return torch.where(_mask(deferred.cut_box, size), partners, pixel_lam * own + (1 - pixel_lam) * partners)


def _mask(areas: Tensor, size: Sequence[int]) -> Tensor:
    """Returns a mask of the pixels in the area of each image, bool [N, 1, H, W]."""
    spans = []
    for axis in (0, 1):
        indices = torch.arange(size[axis], device=areas.device)
        start, length = areas[:, axis, None], areas[:, 2 + axis, None]
        spans.append((indices >= start) & (indices < start + length))
    return (spans[0][:, :, None] & spans[1][:, None, :])[:, None]


def resize(pixels: Tensor, crop_sizes: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes crops in 8-bit pixels [V, 3, h, w] to float32 [V, 3, *size], bilinear with antialiasing.

    The interpolation is linear in each direction, so two matrix products resize a whole batch.
    """
    rows = _weights(crop_sizes[:, 0], pixels.shape[2], size[0])
    columns = _weights(crop_sizes[:, 1], pixels.shape[3], size[1])
    columns = torch.where(crop_sizes[:, 2, None, None] > 0, columns.flip(1), columns)
    return rows[:, None] @ pixels.float() @ columns.transpose(1, 2)[:, None]


def _weights(lengths: Tensor, padded: int, size: int) -> Tensor:
    """Returns the weight of each source pixel in each resized pixel, [V, size, padded].

    The kernel is a triangle of half-width max(scale, 1). Of the `padded` source pixels, the first `lengths` [V] count.
    """
    scale = (lengths / size)[:, None, None]
    centres = (torch.arange(size, device=lengths.device) + 0.5)[:, None] * scale
    indices = torch.arange(padded, device=lengths.device) + 0.5
    weights = (1 - (indices - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = torch.where(indices < lengths[:, None, None], weights, 0)
    return weights / weights.sum(-1, keepdim=True)
