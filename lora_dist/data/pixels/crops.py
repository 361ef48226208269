"""Random crops for training views."""

from math import sqrt

import torch

from lora_dist.data.pixels.images import Box

_MAX_RATIO = 4 / 3
_LOG_MIN, _LOG_MAX = torch.log(torch.tensor([1 / _MAX_RATIO, _MAX_RATIO])).tolist()


def draw_crop(size: tuple[int, int], scale_min: float) -> Box:
    """Draws a crop from torch's CPU generator, exactly as `torchvision.transforms.v2.RandomResizedCrop` does.

    The small tensors of torchvision's `make_params` took a third of the time of a cached image. `size` is width and
    height, `scale_min` the least share of the area; the centre crop of a very long image can have less.
    """
    width, height = size
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(scale_min, 1.0).item()
        # In single precision, as torchvision: double precision rounds some sides differently.
        ratio = torch.empty(1).uniform_(_LOG_MIN, _LOG_MAX).exp_().item()
        crop_width, crop_height = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(torch.randint(height - crop_height + 1, (1,)))
            left = int(torch.randint(width - crop_width + 1, (1,)))
            break
    else:
        crop_width, crop_height = min(width, round(height * _MAX_RATIO)), min(height, round(width * _MAX_RATIO))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height
