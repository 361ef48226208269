"""Views of images, the batches of them that workers build, and the operations that are deferred to the device."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Area = tuple[int, int, int, int]
"""Top, left, height and width of a rectangle in pixels."""

NOWHERE: Area = (0, 0, 0, 0)


class View(NamedTuple):
    """One view of an image.

    Attributes:
        pixels: [3, H, W], 8-bit, or float32 model input.
        erased: set to 0 in the model input.
        flipped: whether the device flips the pixels as it resizes them; None where it does not resize.
    """

    pixels: Tensor
    erased: Area = NOWHERE
    flipped: bool | None = None


class Mixture(NamedTuple):
    """How an image is mixed with its partner: mixup (https://arxiv.org/abs/1710.09412) or CutMix
    (https://arxiv.org/abs/1905.04899).

    Attributes:
        pixel_lam: weight of the image's pixels outside the box, as timm's `lam`; 1 in CutMix.
        cut_box: replaced by the partner; `NOWHERE` in mixup.
        lam: weight of the image's label, in CutMix its share of the area.
    """

    pixel_lam: float
    cut_box: Area
    lam: float


def draw_mixture(mixup_alpha: float, cutmix_alpha: float, size: tuple[int, int], seed: tuple[int, ...]) -> Mixture:
    """Draws a mixture of images of `size` (height, width) from the seed alone: torchvision's transforms mix within the
    batch, which changes with the number of processes.

    An alpha of the Beta distribution is 0 for no mixup or no CutMix; with both, each is drawn half of the time.
    """
    random = np.random.default_rng(seed)
    cut = bool(cutmix_alpha) and (not mixup_alpha or random.random() < 0.5)
    alpha = cutmix_alpha if cut else mixup_alpha
    lam = float(random.beta(alpha, alpha))
    if not cut:
        return Mixture(lam, NOWHERE, lam)
    height, width = size
    cut_height, cut_width = int(height * (1 - lam) ** 0.5), int(width * (1 - lam) ** 0.5)
    top, left = int(random.integers(height - cut_height + 1)), int(random.integers(width - cut_width + 1))
    return Mixture(1.0, (top, left, cut_height, cut_width), 1 - cut_height * cut_width / (height * width))


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


def stack(
    views: Sequence[View], partners: Sequence[int] = (), mixtures: Sequence[Mixture] = ()
) -> tuple[Tensor, DeferredOps]:
    """Stacks views to pixels [V, 3, H, W] of their type, and the operations for `ImageTransforms.model_input`.

    The views of the samples come first, then those of partners that are not samples themselves. `partners` and
    `mixtures` have the number of the partner's view and the mixture of each sample; they are empty without mixing.
    """
    erased = [view.erased for view in views]
    deferred = DeferredOps(torch.tensor(erased) if any(area != NOWHERE for area in erased) else None)
    if mixtures:
        deferred = deferred._replace(
            partners=torch.tensor(partners),
            pixel_lam=torch.tensor([mixture.pixel_lam for mixture in mixtures]),
            cut_box=torch.tensor([mixture.cut_box for mixture in mixtures]),
        )
    pixels = [view.pixels for view in views]
    if views[0].flipped is not None:
        crop_sizes = [(*view.pixels.shape[-2:], int(bool(view.flipped))) for view in views]
        return _pad(pixels), deferred._replace(crop_sizes=torch.tensor(crop_sizes))
    if pixels[0].is_contiguous():
        return torch.stack(pixels), deferred
    # Keeps the channels-last order of decoded images; the device converts it.
    return torch.stack([image.permute(1, 2, 0) for image in pixels]).permute(0, 3, 1, 2), deferred


def _pad(images: Sequence[Tensor]) -> Tensor:
    """Stacks images of different sizes, padded at the bottom right. The padding is left uninitialised."""
    height, width = (max(pixels.shape[axis] for pixels in images) for axis in (1, 2))
    padded = np.empty((len(images), height, width, 3), dtype=np.uint8)
    for image, pixels in zip(padded, images, strict=True):
        image[: pixels.shape[1], : pixels.shape[2]] = pixels.permute(1, 2, 0).numpy()
    return torch.from_numpy(padded).permute(0, 3, 1, 2)


def black(like: View | None, size: tuple[int, int]) -> View:
    """A view whose model input is all 0, in the type of `like`; without it, float32 [3, *size]."""
    pixels = torch.zeros(3, *size) if like is None else torch.zeros_like(like.pixels)
    return View(pixels, (0, 0, *size), None if like is None else like.flipped)


def combine(values: Tensor, deferred: DeferredOps) -> Tensor:
    """Erases and mixes views [V, 3, H, W] that are model input already; returns the samples [B, 3, H, W]."""
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
    """Which pixels lie in the area of each image, bool [N, 1, H, W]."""
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
    """Weight of each of `padded` source pixels, of which the first `lengths` [V] count, in each of `size` pixels: [V,
    size, padded], a triangle kernel of half-width max(scale, 1)."""
    scale = (lengths / size)[:, None, None]
    centres = (torch.arange(size, device=lengths.device) + 0.5)[:, None] * scale
    indices = torch.arange(padded, device=lengths.device) + 0.5
    weights = (1 - (indices - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = torch.where(indices < lengths[:, None, None], weights, 0)
    return weights / weights.sum(-1, keepdim=True)
