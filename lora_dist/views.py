"""Views of images on their way to the model: pixels, and the rest of the work on them, which is done on the device."""

from collections.abc import Callable, Sequence
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
    """

    pixels: Tensor
    erased: Area = NOWHERE


class Mixture(NamedTuple):
    """What an image and its partner make together: mixup (https://arxiv.org/abs/1710.09412), or CutMix
    (https://arxiv.org/abs/1905.04899).

    Attributes:
        faded: share of the image where both are seen at once, which is everywhere; 1 in CutMix.
        pasted: where the partner alone is seen.
        share: of the image in all of it.
    """

    faded: float
    pasted: Area
    share: float


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
    share = float(random.beta(alpha, alpha))
    if not cut:
        return Mixture(share, NOWHERE, share)
    height, width = size
    cut_height, cut_width = int(height * (1 - share) ** 0.5), int(width * (1 - share) ** 0.5)
    top, left = int(random.integers(height - cut_height + 1)), int(random.integers(width - cut_width + 1))
    return Mixture(1.0, (top, left, cut_height, cut_width), 1 - cut_height * cut_width / (height * width))


class Rest(NamedTuple):
    """What is left to do with the views of a batch of B samples; None for what is not.

    Attributes:
        erased: int64 [V, 4], an area of each view.
        partners: int64 [B], the place among the views of what is mixed into each sample, which are the first B.
        faded: float32 [B], as in `Mixture`.
        pasted: int64 [B, 4], as in `Mixture`.
    """

    erased: Tensor | None = None
    partners: Tensor | None = None
    faded: Tensor | None = None
    pasted: Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "Rest":
        """The same on `device`."""
        return Rest(*(None if field is None else field.to(device, non_blocking=non_blocking) for field in self))


def stack(views: Sequence[View], partners: Sequence[int] = (), mixtures: Sequence[Mixture] = ()) -> tuple[Tensor, Rest]:
    """The views of a batch and the rest of the work, for `finish`.

    Args:
        views: of the samples, in order, and after these of partners that are no samples themselves.
        partners: for each sample the place of its partner's view; none without mixing.
        mixtures: for each sample.

    Returns:
        Pixels [V, 3, H, W] in the type of the views, and the rest.
    """
    erased = [view.erased for view in views]
    rest = Rest(torch.tensor(erased) if any(area != NOWHERE for area in erased) else None)
    if mixtures:
        rest = rest._replace(
            partners=torch.tensor(partners),
            faded=torch.tensor([mixture.faded for mixture in mixtures]),
            pasted=torch.tensor([mixture.pasted for mixture in mixtures]),
        )
    return stack_pixels([view.pixels for view in views]), rest


def stack_pixels(images: Sequence[Tensor]) -> Tensor:
    """Images [3, H, W] as [N, 3, H, W], with their channels in memory as they are: to part them is not for the host."""
    if images[0].is_contiguous():
        return torch.stack(list(images))
    return torch.stack([pixels.permute(1, 2, 0) for pixels in images]).permute(0, 3, 1, 2)


def black(like: Tensor | None, size: tuple[int, int]) -> Tensor:
    """A black image [3, *size], in the type and the layout of another one where there is one."""
    return torch.zeros(3, *size) if like is None else torch.zeros_like(like)


def finish(pixels: Tensor, rest: Rest, normalised: Callable[[Tensor], Tensor]) -> Tensor:
    """The samples of a batch as the model takes them, float32 [B, 3, H, W].

    Args:
        pixels: as `stack` gives them, on the device.
        rest: of the work, on the same.
        normalised: the processor's last steps.
    """
    values = normalised(pixels)
    size = values.shape[-2:]
    if rest.erased is not None:
        values = values.masked_fill(_inside(rest.erased, size), 0.0)
    if rest.partners is None or rest.faded is None or rest.pasted is None:
        return values
    own, partners, faded = values[: len(rest.partners)], values[rest.partners], rest.faded[:, None, None, None]
    return torch.where(_inside(rest.pasted, size), partners, faded * own + (1 - faded) * partners)


def _inside(areas: Tensor, size: Sequence[int]) -> Tensor:
    """Which pixels are inside of an area each, bool [N, 1, H, W]."""
    spans = []
    for axis in (0, 1):
        places = torch.arange(size[axis], device=areas.device)
        start, length = areas[:, axis, None], areas[:, 2 + axis, None]
        spans.append((places >= start) & (places < start + length))
    return (spans[0][:, :, None] & spans[1][:, None, :])[:, None]
