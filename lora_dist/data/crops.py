"""Which part of an image a random view shows."""

from math import exp, log, sqrt

import torch

from lora_dist.data.images import Box

_WIDEST = 4 / 3
"""Ratio of the longer side of a part to the shorter."""


def draw_crop(size: tuple[int, int], smallest: float) -> Box:
    """Draws a part of an image from torch's CPU random numbers.

    Source: `make_params` of `torchvision.transforms.v2.RandomResizedCrop`, of which this takes the same numbers and
    makes the same parts. It is on its own because that one's small tensors took longer than all else that is done with
    a cached image.

    Args:
        size: width and height of the image.
        smallest: the share of its area that a part has at least.
    """
    width, height = size
    for _ in range(10):
        share, shape = torch.rand(2).tolist()
        area = (smallest + (1 - smallest) * share) * width * height
        ratio = exp((2 * shape - 1) * log(_WIDEST))
        inner_width, inner_height = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < inner_width <= width and 0 < inner_height <= height:
            top = int(torch.randint(height - inner_height + 1, (1,)))
            left = int(torch.randint(width - inner_width + 1, (1,)))
            break
    else:
        inner_width, inner_height = min(width, round(height * _WIDEST)), min(height, round(width * _WIDEST))
        left, top = (width - inner_width) // 2, (height - inner_height) // 2
    return left, top, left + inner_width, top + inner_height
