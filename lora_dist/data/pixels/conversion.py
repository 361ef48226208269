"""Converts images of any mode to 8-bit RGB: background of transparent images, range of deep pixels."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

_LEVEL = {"1": 255, "L;2": 85, "L;4": 17}
"""Difference of two levels of a grey PNG image of 1, 2 or 4 bits, in 8 bits."""


class Conversion(NamedTuple):
    """Settings of the conversion to 8-bit RGB. Opaque 8-bit images do not depend on them.

    Attributes:
        transparent_background: red, green and blue behind transparent pixels; None ignores transparency, as
            `transformers.image_utils.load_image` does.
        pixel_range: values that become 0 and 255 in images of more than 8 bits; None keeps the upper 8 of 16 bits, and
            clips floating-point values at 0 and 255.
        all_depths: whether the background is also shown where a PNG of 2, 4 or 16 bits per channel has the color that
            its header calls transparent (tRNS). Older releases ignored that color.
    """

    transparent_background: tuple[int, int, int] | None = None
    pixel_range: tuple[float, float] | None = None
    all_depths: bool = False

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Conversion":
        """Reads what `record` returned; missing fields have their defaults. Raises any exception for anything else."""
        background, limits = record.get("transparent_background"), record.get("pixel_range")
        if background is not None and (
            len(background) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in background)
        ):
            raise ValueError(f"transparent_background {background} is not three numbers from 0 to 255")
        if limits is not None and (len(limits) != 2 or not -math.inf < limits[0] < limits[1] < math.inf):
            raise ValueError(f"pixel_range {limits} is not two ascending numbers")
        return cls(
            None if background is None else tuple(background),
            None if limits is None else tuple(limits),
            record.get("all_depths") is True,
        )

    def record(self) -> dict[str, Any]:
        """The conversion as JSON values; that of an older release is the same as in that release."""
        ranges = {"transparent_background": self.transparent_background, "pixel_range": self.pixel_range}
        values: dict[str, Any] = {name: None if value is None else list(value) for name, value in ranges.items()}
        return values | ({"all_depths": True} if self.all_depths else {})

    def scale_transparent_color(self, image: Image.Image) -> None:
        """Scales the transparent color (tRNS) of a PNG of 1, 2, 4 or 16 bits as Pillow scales its pixels.

        Must be called before the image is loaded.
        """
        color = image.info.get("transparency")
        if not (self.all_depths and isinstance(image, PngImageFile) and image.tile) or color is None:
            return
        raw_mode = image.tile[0][3]  # a plain tuple before Pillow 11
        if raw_mode in _LEVEL:
            # Pillow 12 has already scaled the color of 1 bit.
            image.info["transparency"] = min(255, color * _LEVEL[raw_mode])
        elif raw_mode == "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in color)

    def to_rgb(self, image: Image.Image) -> Image.Image:
        """Converts a loaded image."""
        if is_deep(image):
            pixels = np.asarray(image)
            shown = Image.fromarray(self._eight_bits(pixels, image.mode)).convert("RGB")
            value = self.transparent_value(image)
            if self.transparent_background is not None and value is not None:
                shown.paste(self.transparent_background, mask=Image.fromarray(pixels == value))
            return shown
        if self.transparent_background is not None and image.has_transparency_data:
            shown = image.convert("RGBA")
            if np.asarray(shown.getchannel("A")).min() < 255:
                background = Image.new("RGBA", image.size, (*self.transparent_background, 255))
                return Image.alpha_composite(background, shown).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")

    def transparent_value(self, image: Image.Image) -> Any:
        """The value of the pixels of an image of more than 8 bits in whose place the background is shown, or None."""
        is_shown = self.transparent_background is not None and self.all_depths
        return image.info.get("transparency") if is_shown else None

    def _eight_bits(self, pixels: np.ndarray, mode: str) -> np.ndarray:
        if self.pixel_range is not None:
            low, high = self.pixel_range
            scaled = (pixels.astype(np.float64) - low) * (255 / (high - low))
            return np.nan_to_num(scaled).clip(0, 255).round().astype(np.uint8)
        if mode == "F":
            return np.nan_to_num(pixels).clip(0, 255).astype(np.uint8)
        return (pixels.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)


AS_TRANSFORMERS = Conversion()
"""The conversion of bundles and checkpoints without a record, and of models of other programs."""


def is_deep(image: Image.Image) -> bool:
    """Whether the pixels have more than 8 bits: integers of 16 or 32 bits, or floating-point numbers."""
    return image.mode.startswith("I") or image.mode == "F"
