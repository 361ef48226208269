"""Finding image files, and decoding them to upright RGB, as a whole or in part."""

import io
import logging
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from lora_dist.data.pixels import limits as limits  # sets the most pixels in every process
from lora_dist.data.pixels.conversion import AS_TRANSFORMERS, Conversion, is_deep
from lora_dist.data.pixels.formats import START_BYTES, unidentified

logger = logging.getLogger(__name__)


def leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one of its parents, which would make a walk endless."""
    return folder.is_symlink() and any(parent.resolve() == folder.resolve() for parent in folder.absolute().parents)


class UnreadableImageError(Exception):
    """An image that cannot be decoded; the message names it and the cause."""


Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""

RANGE_IMAGES, RANGE_PIXELS = 64, 10_000
"""Largest number of images, and of pixels of each, from which the range of deep pixels is found."""

_warned: set[str] = set()

ImageSource = str | bytes | Image.Image | np.ndarray

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns an image upright, by its EXIF orientation."""


class Picture:
    """An image of upright `size` (width, height) that decodes only what is needed, or raises `UnreadableImageError`."""

    def __init__(self, image: Image.Image, name: str, conversion: Conversion = AS_TRANSFORMERS) -> None:
        self._image = image
        self._name = name
        self._conversion = conversion
        if conversion.pixel_range is None and is_deep(image):
            _warn_of_depth(image.mode, name)
        if image.format not in ("JPEG", "MPO"):
            conversion.scale_transparent_color(image)
            # Of other formats, the header alone need not tell the size.
            image.load()
        self._orientation = _orientation(image)
        self.size = image.size if self._orientation < 5 else image.size[::-1]

    def whole(self) -> Image.Image:
        """The whole image in upright 8-bit RGB."""
        with _named(self._name):
            self._image.load()
            return _upright(self._conversion.to_rgb(self._image), self._orientation)

    def part(self, box: Box, least: tuple[int, int]) -> np.ndarray:
        """The pixels in `box` in upright 8-bit RGB [h, w, 3]. Can be called once.

        A JPEG is decoded at a half, quarter or eighth of its size, but no smaller than `least` (width, height).
        """
        with _named(self._name):
            stored = _stored_box(box, self._orientation, self._image.size)
            scale = self._reduce(stored, least if self._orientation < 5 else least[::-1])
            self._image.load()
            left, top, right, bottom = (round(side / scale) for side in stored)
            part = self._conversion.to_rgb(self._image.crop((left, top, right, bottom)))
            return np.array(_upright(part, self._orientation))

    def _reduce(self, box: Box, least: tuple[int, int]) -> float:
        """Sets the decoder to the smallest size that suffices; returns the factor by which it reduces each side."""
        # One pixel more, because the box is rounded.
        inner = [(size + 1) / (end - start) for size, start, end in zip(least, box[:2], box[2:], strict=True)]
        width, height = self._image.size
        reduced = self._image.draft(None, (math.ceil(width * inner[0]), math.ceil(height * inner[1])))
        return width / reduced[1][2] if reduced else 1.0


class _Pixels(Picture):
    """The picture of an array of pixels."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels
        self.size = pixels.shape[1], pixels.shape[0]

    def whole(self) -> Image.Image:
        return Image.fromarray(self._pixels)

    def part(self, box: Box, least: tuple[int, int]) -> np.ndarray:
        left, top, right, bottom = box
        return self._pixels[top:bottom, left:right]


def _stored_box(box: Box, orientation: int, size: tuple[int, int]) -> Box:
    """Converts a box of the upright image to coordinates of the stored image of `size`, which is not yet rotated."""
    left, top, right, bottom = box if orientation < 5 else (box[1], box[0], box[3], box[2])
    if orientation in (2, 3, 7, 8):
        left, right = size[0] - right, size[0] - left
    if orientation in (3, 4, 6, 7):
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image; 1, which is upright, if it has none or its metadata is damaged."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        # Pillow's parsers raise whatever damaged metadata leads them to; the pixels are readable all the same.
        return 1
    return found if found in _TRANSPOSE else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation not in _TRANSPOSE:
        return image
    image = image.transpose(_TRANSPOSE[orientation])
    # The metadata still has the old orientation.
    image.info.clear()
    return image


@contextmanager
def opened(source: ImageSource, name: str = "", conversion: Conversion = AS_TRANSFORMERS) -> Iterator[Picture]:
    """Opens a path, the bytes of an image file, a Pillow image, or 8-bit RGB pixels [H, W, 3], which are not converted.

    Raises `UnreadableImageError`, with `name` or the path, for anything that is not a readable image.
    """
    name = name or (source if isinstance(source, str) else "image")
    with ExitStack() as stack:
        with _named(name):
            if isinstance(source, np.ndarray):
                picture: Picture = _Pixels(source)
            else:
                picture = Picture(_image(source, name, stack), name, conversion)
        yield picture


def _image(source: str | bytes | Image.Image, name: str, stack: ExitStack) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if source is None:
        raise UnreadableImageError(
            f"{name}: not an image: None; in a tar file, all images need the same extension, in the same case"
        )
    # The cells of a table may hold anything.
    if not isinstance(source, str | bytes | os.PathLike) or source == "":
        raise UnreadableImageError(f"{name}: not an image: {source!r:.40}")
    if isinstance(source, bytes):
        file: BinaryIO = io.BytesIO(source)
    # Opening a pipe would wait for a writer.
    elif not stat.S_ISREG(Path(source).stat().st_mode):
        raise UnreadableImageError(f"{name}: not a file")
    else:
        # Pillow maps a file into memory if it knows its path, and then garbles TIFF images that are stored sideways.
        file = stack.enter_context(Path(source).open("rb"))  # noqa: SIM115
    try:
        return stack.enter_context(Image.open(file))
    except UnidentifiedImageError as error:
        file.seek(0)
        raise UnreadableImageError(f"{name}: {unidentified(file.read(START_BYTES))}") from error


def load_rgb(source: ImageSource, name: str = "", conversion: Conversion = AS_TRANSFORMERS) -> Image.Image:
    """Decodes an image of any mode (L, LA, RGBA, P, CMYK, I;16, 1, F …) to upright 8-bit RGB.

    By default, agrees with `transformers.image_utils.load_image`, except that 16-bit pixels are scaled to 8 bits, not
    clipped at 255. Takes the arguments of `opened` and raises its errors.
    """
    with opened(source, name, conversion) as picture:
        return picture.whole()


def find_pixel_range(
    images: Iterable[tuple[str | bytes | Image.Image, str]], conversion: Conversion
) -> tuple[float, float] | None:
    """The range of the pixels of those images that have more than 8 bits, without the outermost 0.1% on both sides.

    `images` are sources and names, as `opened` takes them. Pixels in whose place the `conversion` shows the background
    do not count. Returns None if no readable image has more than 8 bits.
    """
    return range_of(deep_pixels(source, name, conversion) for source, name in images)


def deep_pixels(source: str | bytes | Image.Image, name: str, conversion: Conversion) -> np.ndarray | None:
    """Up to `RANGE_PIXELS` evenly spaced pixels of an image of more than 8 bits; None for any other image."""
    with suppress(UnreadableImageError), _named(name), ExitStack() as stack:
        image = _image(source, name, stack)
        if is_deep(image):
            pixels = np.asarray(image, dtype=np.float64).ravel()
            pixels = pixels[pixels != conversion.transparent_value(image)]
            return pixels[:: -(-pixels.size // RANGE_PIXELS) or 1]
    return None


def range_of(found: Iterable[np.ndarray | None]) -> tuple[float, float] | None:
    """The range of the pixels that `deep_pixels` found, without the outermost 0.1% on both sides; None without any."""
    some = [pixels for pixels in found if pixels is not None]
    pixels = np.concatenate(some) if some else np.zeros(0)
    pixels = pixels[np.isfinite(pixels)]
    if not pixels.size:
        return None
    low, high = (float(value) for value in np.percentile(pixels, (0.1, 99.9)))
    return (low, high) if low < high else (low, low + 1)


def _warn_of_depth(mode: str, name: str) -> None:
    """Warns once per process and mode."""
    if mode not in _warned:
        _warned.add(mode)
        how = "values outside 0 to 255 are clipped" if mode == "F" else "values from 0 to 65535 become 0 to 255"
        logger.warning("%s: pixels of mode %s, and no pixel range is known: %s", name, mode, how)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        size = str(error).partition(",")[0]
        raise UnreadableImageError(f"{name}: {size}; --max_image_pixels sets another limit") from error
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            elsewhere = "" if error.filename in (None, name) else f": {error.filename}"
            raise UnreadableImageError(f"{name}: {error.strerror}{elsewhere}") from error
        # Pillow's decoders raise whatever a damaged file leads them to, struct.error and RuntimeError among them.
        raise UnreadableImageError(f"{name}: {type(error).__name__}: {error}") from error


def from_cell(cell: Any) -> tuple[str | bytes | Image.Image, str]:
    """Source and name of an undecoded image cell of `datasets`: `{"path": …, "bytes": …}`, a path or an image."""
    if isinstance(cell, dict):
        path, data = cell.get("path"), cell.get("bytes")
        return (data, path or "") if data is not None else (path or "", path or "")
    return cell, cell if isinstance(cell, str) else ""
