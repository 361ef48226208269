"""Views of images on their way to the model: pixels, and the rest of the work on them, which is done on the device."""

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
        pixels: [3, H, W], 8-bit; or float32 where they are as the model takes them.
        erased: what is to become 0 once they are as the model takes them.
        flipped: where the pixels are to be resized on the device: whether they are turned left to right as well.
    """

    pixels: Tensor
    erased: Area = NOWHERE
    flipped: bool | None = None


class Mixture(NamedTuple):
    """What an image and its partner make together: mixup (https://arxiv.org/abs/1710.09412), or CutMix
    (https://arxiv.org/abs/1905.04899).

    Attributes:
        pixel_lam: weight of the image's pixels outside the box, as timm's `lam`; 1 in CutMix.
        cut_box: where the partner alone is seen; `NOWHERE` in mixup.
        lam: weight of the image's label: its share of the area in CutMix.
    """

    pixel_lam: float
    cut_box: Area
    lam: float


def draw_mixture(mixup_alpha: float, cutmix_alpha: float, size: tuple[int, int], seed: tuple[int, ...]) -> Mixture:
    """How a pair is mixed.

    torchvision's batch-wise transforms mix with whatever else is in the batch, which changes with the number of
    processes; here the pair and the seed decide.

    Args:
        mixup_alpha: of the Beta distribution; 0 for no mixup.
        cutmix_alpha: the same for CutMix; with both, one of them is drawn evenly.
        size: height and width of the images.
        seed: decides everything random.
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
    """What is left to do with the views of a batch of B samples; None for what is not.

    Attributes:
        erased: int64 [V, 4], an area of each view.
        partners: int64 [B], the place among the views of what is mixed into each sample, which are the first B.
        pixel_lam: float32 [B], as in `Mixture`.
        cut_box: int64 [B, 4], as in `Mixture`.
        crop_sizes: int64 [V, 3], the height and width of each view at the top left of its pixels, and whether it is
            flipped; the device resizes these.
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
    """The views of a batch and the rest of the work, for `ImageTransforms.model_input`.

    Args:
        views: of the samples, in order, and after these of partners that are no samples themselves.
        partners: for each sample the place of its partner's view; none without mixing.
        mixtures: for each sample.

    Returns:
        Pixels [V, 3, H, W] in the type of the views, and the rest.
    """
    erased = [view.erased for view in views]
    rest = DeferredOps(torch.tensor(erased) if any(area != NOWHERE for area in erased) else None)
    if mixtures:
        rest = rest._replace(
            partners=torch.tensor(partners),
            pixel_lam=torch.tensor([mixture.pixel_lam for mixture in mixtures]),
            cut_box=torch.tensor([mixture.cut_box for mixture in mixtures]),
        )
    pixels = [view.pixels for view in views]
    if views[0].flipped is None:
        return stack_pixels(pixels), rest
    crop_sizes = [(*view.pixels.shape[-2:], int(bool(view.flipped))) for view in views]
    return _stack_sizes(pixels), rest._replace(crop_sizes=torch.tensor(crop_sizes))


def stack_pixels(images: Sequence[Tensor]) -> Tensor:
    """Images [3, H, W] as [N, 3, H, W], with their channels in memory as they are: to part them is not for the host."""
    if images[0].is_contiguous():
        return torch.stack(list(images))
    return torch.stack([pixels.permute(1, 2, 0) for pixels in images]).permute(0, 3, 1, 2)


def _stack_sizes(images: Sequence[Tensor]) -> Tensor:
    """Images of different sizes in the top left of one that has room for each; what is beside them can be anything."""
    height, width = (max(pixels.shape[axis] for pixels in images) for axis in (1, 2))
    together = np.empty((len(images), height, width, 3), dtype=np.uint8)
    for index, pixels in enumerate(images):
        together[index, : pixels.shape[1], : pixels.shape[2]] = pixels.permute(1, 2, 0).numpy()
    return torch.from_numpy(together).permute(0, 3, 1, 2)


def black(like: View | None, size: tuple[int, int]) -> View:
    """A view [3, *size] that is black and all 0 to the model, in the type of another one where there is one."""
    whole = (0, 0, *size)
    return (
        View(torch.zeros(3, *size), whole)
        if like is None
        else like._replace(pixels=torch.zeros_like(like.pixels), erased=whole)
    )


def combine(values: Tensor, rest: DeferredOps) -> Tensor:
    """The samples of a batch [B, 3, H, W] from their views as the model takes them, [V, 3, H, W]: erased and mixed."""
    size = values.shape[-2:]
    if rest.erased is not None:
        values = values.masked_fill(_inside(rest.erased, size), 0.0)
    if rest.partners is None or rest.pixel_lam is None or rest.cut_box is None:
        return values
    own, partners, pixel_lam = values[: len(rest.partners)], values[rest.partners], rest.pixel_lam[:, None, None, None]
    return torch.where(_inside(rest.cut_box, size), partners, pixel_lam * own + (1 - pixel_lam) * partners)


def _inside(areas: Tensor, size: Sequence[int]) -> Tensor:
    """Which pixels are inside of an area each, bool [N, 1, H, W]."""
    spans = []
    for axis in (0, 1):
        indices = torch.arange(size[axis], device=areas.device)
        start, length = areas[:, axis, None], areas[:, 2 + axis, None]
        spans.append((indices >= start) & (indices < start + length))
    return (spans[0][:, :, None] & spans[1][:, None, :])[:, None]


def resize(pixels: Tensor, crop_sizes: Tensor, size: tuple[int, int]) -> Tensor:
    """Parts of 8-bit images, resized by bilinear interpolation with antialiasing, float32 [V, 3, *size] of 0 to 255.

    That is linear in each direction, and so for a whole batch two products of matrices, on any device.

    Args:
        pixels: [V, 3, h, w].
        crop_sizes: as in `DeferredOps`.
        size: height and width.
    """
    rows = _weights(crop_sizes[:, 0], pixels.shape[2], size[0])
    columns = _weights(crop_sizes[:, 1], pixels.shape[3], size[1])
    columns = torch.where(crop_sizes[:, 2, None, None] > 0, columns.flip(1), columns)
    return rows[:, None] @ pixels.float() @ columns.transpose(1, 2)[:, None]


def _weights(lengths: Tensor, room: int, size: int) -> Tensor:
    """How much of each of `room` pixels, of which the first `lengths` [V] count, is in each of `size`: [V, size, room].

    A triangle around its centre says it, which is as wide as two of the pixels that are larger.
    """
    scale = (lengths / size)[:, None, None]
    centres = (torch.arange(size, device=lengths.device) + 0.5)[:, None] * scale
    indices = torch.arange(room, device=lengths.device) + 0.5
    weights = (1 - (indices - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = torch.where(indices < lengths[:, None, None], weights, 0)
    return weights / weights.sum(-1, keepdim=True)
