"""Describes in words how an image becomes model input, for users of an ONNX file without this package."""

import logging
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import crop, resize

from lora_dist.data.pixels.conversion import Conversion
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.errors import UserError

logger = logging.getLogger(__name__)
LEVELS = 2.5
"""Largest difference of the described steps, in levels of 8 bits: Pillow and torchvision round differently."""


class Geometry(NamedTuple):
    """Resizing, to height and width or to a shorter side, with a filter of Pillow; and how the middle is cut out.

    Where a margin is odd, the offset is rounded: `down` as in transformers, or `to even` as in torchvision.
    """

    resized: tuple[int, int] | int | None
    resample: Image.Resampling
    middle: Literal["down", "to even"] | None


class Colors(NamedTuple):
    """Last steps for red, green and blue: (value x factor - mean) / deviation; whether the channels are reversed."""

    factor: float
    mean: list[float]
    deviation: list[float]
    reversed: bool


def describe(transforms: ImageTransforms) -> str:
    """Describes the preprocessing, after comparing the described steps with the processor on two images.

    If no such steps give the output of the processor, the text says so, and a warning is logged.
    """
    colors = _colors(transforms)
    geometry = next((one for one in _geometries(transforms) if colors is not None and _fits(one, transforms)), None)
    if colors is None or geometry is None:
        name = type(transforms.processor).__name__
        logger.warning("the preprocessing of %s cannot be described in words, and is missing from the ONNX file", name)
        return f"missing: the steps of {name} cannot be described in words; preprocessor_config has its settings"
    return "; ".join(f"{number}. {step}" for number, step in enumerate(_steps(transforms, geometry, colors), 1))


def _steps(transforms: ImageTransforms, geometry: Geometry, colors: Colors) -> Iterator[str]:
    height, width = transforms.height, transforms.width
    yield ", ".join(["decode to 8-bit RGB", *_described(transforms.conversion), "turned upright as EXIF says"])
    if geometry.resized is not None:
        side = geometry.resized
        to = f"its shorter side to {side} pixels"
        if not isinstance(side, int):
            to = f"to {side[0]} x {side[1]} (height x width)"
        yield f"resize {to}, {geometry.resample.name.lower()} with antialiasing, as torchvision resizes 8-bit tensors"
    if geometry.middle is not None:
        yield f"cut the middle {height} x {width} out (offsets rounded {geometry.middle})"
    if colors.factor != 1:
        yield f"multiply by {colors.factor!r}"
    if (colors.mean, colors.deviation) != ([0.0] * 3, [1.0] * 3):
        yield (
            f"subtract the mean {colors.mean} and divide by the standard deviation {colors.deviation}, for red, green "
            f"and blue"
        )
    order = "blue, green, red" if colors.reversed else "red, green, blue"
    yield f"float32 of shape [batch, 3, {height}, {width}]: image, channel ({order}), row, column"


def _described(conversion: Conversion) -> Iterator[str]:
    if conversion.transparent_background is not None:
        yield "transparent pixels on RGB {} {} {}".format(*conversion.transparent_background)
    if conversion.pixel_range is not None:
        yield "pixels of more than 8 bits scaled so that {:g} to {:g} become 0 to 255".format(*conversion.pixel_range)


def _colors(transforms: ImageTransforms) -> Colors | None:
    """The last steps as measured, in the numbers of the processor's configuration where these are right."""
    try:
        matrix, offset = transforms.affine_map
    except UserError:
        return None
    is_reversed = bool(matrix[0, 0] == 0)
    if is_reversed:
        matrix, offset = matrix.flip(0), offset.flip(0)
    slope = matrix.diagonal()
    if not torch.equal(matrix, slope.diag()) or not (slope > 0).all():
        return None
    settings = transforms.processor.to_dict()
    factor = settings["rescale_factor"] if settings.get("do_rescale") else 1.0
    named = settings.get("do_normalize") and settings.get("image_mean") is not None
    mean, deviation = (
        (list(settings[name]) for name in ("image_mean", "image_std")) if named else ([0.0] * 3, [1.0] * 3)
    )
    slopes, offsets = factor / torch.tensor(deviation), -torch.tensor(mean) / torch.tensor(deviation)
    if not (torch.allclose(slopes, slope, rtol=1e-4) and torch.allclose(offsets, offset, rtol=1e-4, atol=1e-4)):
        factor = 1 / 255
        mean = [round(float(value), 6) + 0.0 for value in -offset * factor / slope]
        deviation = [round(float(value), 6) for value in factor / slope]
    return Colors(factor, mean, deviation, is_reversed)


def _geometries(transforms: ImageTransforms) -> Iterator[Geometry]:
    """Yields the possible meanings of a processor's configuration, the most likely first."""
    settings = transforms.processor.to_dict()
    of_timm = settings.get("data_config") or {}
    name = of_timm.get("interpolation") or settings.get("resample")
    resample = Image.Resampling[name.upper()] if isinstance(name, str) else Image.Resampling(int(name or 0))
    size, height = dict(settings.get("size") or {}), transforms.height
    whole = (transforms.height, transforms.width)
    crop_pct = settings.get("crop_pct") or of_timm.get("crop_pct")
    sides: list[tuple[int, int] | int] = []
    if size.get("height") and size.get("width"):
        sides.append((size["height"], size["width"]))
    if edge := size.get("shortest_edge"):
        # LeViT resizes to more than its configuration says.
        sides += [edge, int(256 / 224 * edge)]
    if crop_pct:
        sides.append(int(height / crop_pct))
    yield Geometry(whole, resample, None)
    for side in (*sides, None):
        yield Geometry(side, resample, "down")
        yield Geometry(side, resample, "to even")


def _fits(geometry: Geometry, transforms: ImageTransforms) -> bool:
    """Whether these steps give the output of the processor, for a high and for a wide image."""
    matrix, offset = transforms.affine_map
    for shape in ((250, 180), (170, 230)):
        image = _picture(*shape)
        expected = torch.linalg.solve(matrix, (transforms.evaluation(image) - offset[:, None, None]).flatten(1))
        made = _applied(geometry, image, (transforms.height, transforms.width))
        if (expected - made.flatten(1)).abs().max() > LEVELS:
            return False
    return True


def _applied(geometry: Geometry, image: Image.Image, size: tuple[int, int]) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if geometry.resized is not None:
        side = [geometry.resized] if isinstance(geometry.resized, int) else list(geometry.resized)
        mode = InterpolationMode(geometry.resample.name.lower())
        pixels = resize(pixels, side, mode, antialias=True)
    if geometry.middle is not None:
        margins = [(found - wanted) / 2 for found, wanted in zip(pixels.shape[1:], size, strict=True)]
        top, left = (int(margin) if geometry.middle == "down" else round(margin) for margin in margins)
        pixels = crop(pixels, top, left, *size)
    return pixels.float()


def _picture(height: int, width: int) -> Image.Image:
    """An image with edges and slopes, whose middle and margins differ."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 7) * np.cos(columns / 9), rows / height + columns / width - 1, np.sign(np.sin(columns / 17))]
    values: Any = np.stack(waves, axis=-1) * 100 + 128
    return Image.fromarray(values.astype(np.uint8))
