"""Limits of an image: the pixels of its file, and its pixels after the resize of an image processor."""

import os
from math import gcd
from typing import Any

import numpy as np
from PIL import Image

from lora_dist.data.pixels.processor import ProcessorError, processed

MAX_RESIZED = 50_000_000
"""Largest number of pixels of a resized image: about 350 MB while it is processed."""
CROPPED_RATIO, _KEPT_RATIO = 32, 16
"""Images longer than this multiple of their shorter side are cropped to about the second multiple before the resize."""
_USUAL_EDGE = 256
_VARIABLE = "LORA_DIST_MAX_IMAGE_PIXELS"
_PILLOWS = Image.MAX_IMAGE_PIXELS


def allow_pixels(most: int | None) -> None:
    """Sets the most pixels of an image to decode, in this process and in those that it starts; None: Pillow's limit."""
    if most is None:
        os.environ.pop(_VARIABLE, None)
        Image.MAX_IMAGE_PIXELS = _PILLOWS
    else:
        os.environ[_VARIABLE] = str(most)
        # Pillow refuses twice this number, and warns from this number on.
        Image.MAX_IMAGE_PIXELS = most // 2


if _VARIABLE in os.environ:
    allow_pixels(int(os.environ[_VARIABLE]))


class TooLongError(Exception):
    """An image so long and thin that resizing its shorter side takes too much memory."""


class CentreCrop:
    """Crops a long image before an image processor that keeps only its centre resizes it.

    Attributes:
        edge: length of the shorter side of resized images; None for a processor that resizes to a fixed size.
    """

    def __init__(self, processor: Any) -> None:
        self.edge = _shortest_edge(processor)

    def resized_pixels(self, size: tuple[int, int]) -> int:
        """Pixels of an image of `size` while it is resized, the larger of before and after."""
        return max(size[0] * size[1], 0 if self.edge is None else _resized_pixels(size, self.edge))

    def __call__(self, image: Image.Image) -> Image.Image:
        """Crops a long image if the processor makes the same pixels of the crop.

        Raises `TooLongError` if resizing would give more than `MAX_RESIZED` pixels.
        """
        if self.edge is None:
            return image
        cut = _cut(image.size, self.edge)
        if cut:
            width, height = image.size
            image = image.crop((cut, 0, width - cut, height) if width > height else (0, cut, width, height - cut))
        if (pixels := _resized_pixels(image.size, self.edge)) > MAX_RESIZED:
            raise TooLongError(
                f"{image.width} x {image.height} pixels are too long and thin: the image processor resizes the shorter "
                f"side to {self.edge}, which gives {pixels / 1e6:,.0f} million pixels, more than {MAX_RESIZED / 1e6:g}"
            )
        return image


def is_too_thin(size: tuple[int, int]) -> bool:
    """Whether `CentreCrop` refuses an image of `size` with a processor whose shorter side is the usual 256."""
    return not _cut(size, _USUAL_EDGE) and _resized_pixels(size, _USUAL_EDGE) > MAX_RESIZED


def _resized_pixels(size: tuple[int, int], edge: int) -> int:
    return edge * edge * max(size) // max(min(size), 1)


def _cut(size: tuple[int, int], edge: int) -> int:
    """Pixels that both ends of an image can lose before its shorter side is resized, without a change of the centre.

    The resized pixels stay the same only where whole pixels of the result are cut off.
    """
    short, long = sorted(size)
    if long <= CROPPED_RATIO * short or edge * long % short:
        return 0
    step = short // gcd(short, edge)
    return (long - _KEPT_RATIO * short) // 2 // step * step


def _shortest_edge(processor: Any) -> int | None:
    """The shorter side of resized images, if the processor keeps only the centre of the longer one."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 160, 3)).astype(np.uint8)
    long = Image.fromarray(pixels)
    try:
        sides = processed(processor, long, do_center_crop=False).shape[-2:]
        # Where the crop is a part of the resize, the size is that of the crop.
        edge = int(min(sides) / (getattr(processor, "crop_pct", None) or 1)) if sides[0] == sides[1] else min(sides)
        whole, centre = (processed(processor, image) for image in (long, long.crop((40, 0, 120, 4))))
    except ProcessorError:
        return None
    # The part that `_cut` keeps has to contain the crop.
    is_kept = bool((whole == centre).all()) and _KEPT_RATIO * edge >= max(whole.shape[-2:])
    return edge if is_kept else None
