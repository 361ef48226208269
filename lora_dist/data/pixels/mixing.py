"""Draws mixup and CutMix from a seed: the share and the area of the partner image. `deferred.combine` mixes them."""

from typing import NamedTuple

import numpy as np

Area = tuple[int, int, int, int]
"""Top, left, height and width of a rectangle in pixels."""

NOWHERE: Area = (0, 0, 0, 0)


class Mixture(NamedTuple):
    """The numbers by which an image is mixed with its partner, in mixup (https://arxiv.org/abs/1710.09412) or CutMix
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
    """Draws a mixture of images of `size` (height, width) from the seed alone.

    The transforms of torchvision mix within the batch, which changes with the number of processes. An alpha of the Beta
    distribution is 0 for no mixup or no CutMix; with both, each is drawn half of the time.
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
