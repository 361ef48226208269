"""Views of images, and the batches of them that workers build."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_dist.data.pixels.deferred import DeferredOps
from lora_dist.data.pixels.mixing import NOWHERE, Area, Mixture


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
