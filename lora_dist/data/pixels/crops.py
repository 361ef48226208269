"""Which part of an image a random view shows."""

from math import sqrt

import torch

from lora_dist.data.pixels.images import Box

_WIDEST = 4 / 3
"""Ratio of the longer side of a part to the shorter, at most."""
_NARROWEST_LOG, _WIDEST_LOG = torch.log(torch.tensor([1 / _WIDEST, _WIDEST])).tolist()


def draw_crop(size: tuple[int, int], smallest: float) -> Box:
    """Draws a part of an image from torch's CPU random numbers.

    Source: `make_params` of `torchvision.transforms.v2.RandomResizedCrop`. This takes the same numbers and makes the
    same parts. It stands here because the small tensors of that one took a third of the time of a cached image.

    Args:
        size: width and height of the image.
        smallest: the share of its area that a part has at least; the middle of a long one can have less.
    """
    width, height = size
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(smallest, 1.0).item()
        # In single precision, as there: a side that is rounded otherwise has its place elsewhere.
        ratio = torch.empty(1).uniform_(_NARROWEST_LOG, _WIDEST_LOG).exp_().item()
        inner_width, inner_height = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < inner_width <= width and 0 < inner_height <= height:
            top = int(torch.randint(height - inner_height + 1, (1,)))
            left = int(torch.randint(width - inner_width + 1, (1,)))
            break
    else:
        inner_width, inner_height = min(width, round(height * _WIDEST)), min(height, round(width * _WIDEST))
        left, top = (width - inner_width) // 2, (height - inner_height) // 2
    return left, top, left + inner_width, top + inner_height
