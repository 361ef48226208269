"""Any image file to upright RGB pixels, all of them or a part."""

import io
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from PIL import ExifTags, Image

from lora_dist.errors import UserError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
"""Files of these endings are taken for images, in any case of letters."""


def is_image_name(file: str) -> bool:
    """Whether a file is taken for an image, by its name."""
    return os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


def image_files(directory: str | Path) -> Iterator[str]:
    """Those of `visible_files` that are taken for images."""
    return filter(is_image_name, visible_files(directory))


def visible_files(directory: str | Path) -> Iterator[str]:
    """Files below a directory, hidden files and folders left out, in an order that is the same on every machine.

    Raises:
        UserError: a folder cannot be read, whose files would be missing without a word.
    """
    for folder, folders, files in os.walk(directory, onerror=_refuse, followlinks=True):
        folders[:] = sorted(
            inner for inner in folders if not inner.startswith(".") and not leads_back(Path(folder, inner))
        )
        yield from (os.path.join(folder, file) for file in sorted(files) if not file.startswith("."))


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: {error.strerror}; all of the data has to be readable") from error


def leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one on the way to it, where a walk would go round for ever."""
    return folder.is_symlink() and any(parent.resolve() == folder.resolve() for parent in folder.absolute().parents)


class UnreadableImageError(Exception):
    """An image that cannot be decoded; the message names it and says why."""


Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""

ImageSource = str | bytes | Image.Image | np.ndarray

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by the orientation in its EXIF data."""


class Picture(Protocol):
    """An opened image, of which no more is decoded and converted than is asked for; see `opened`.

    Its methods raise `UnreadableImageError`.

    Attributes:
        size: width and height, upright.
    """

    size: tuple[int, int]

    def whole(self) -> Image.Image:
        """All of it in 8-bit RGB, upright."""
        ...

    def part(self, box: Box, least: tuple[int, int]) -> np.ndarray:
        """What is in `box`, upright, in 8-bit RGB [h, w, 3]: as it is, or smaller, but no smaller than `least` (width,
        height). It can be asked for one part, once."""
        ...


class _Decoded:
    """The picture of pixels that are there."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels
        self.size = pixels.shape[1], pixels.shape[0]

    def whole(self) -> Image.Image:
        return Image.fromarray(self._pixels)

    def part(self, box: Box, least: tuple[int, int]) -> np.ndarray:
        left, top, right, bottom = box
        return self._pixels[top:bottom, left:right]


class _Encoded:
    """The picture of an image of any mode.

    Of a JPEG, a half, quarter or eighth of the pixels in each direction is decoded where that leaves enough, and the
    box is rounded to these.
    """

    def __init__(self, image: Image.Image, name: str) -> None:
        self._image = image
        self._name = name
        if image.format not in ("JPEG", "MPO"):
            # Of other formats, the header alone need not tell the size.
            image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        self._orientation: int = orientation if orientation in _UPRIGHT else 1
        self.size = image.size if self._orientation < 5 else image.size[::-1]

    def whole(self) -> Image.Image:
        with _named(self._name):
            self._image.load()
            return _to_rgb(_upright(self._image, self._orientation))

    def part(self, box: Box, least: tuple[int, int]) -> np.ndarray:
        with _named(self._name):
            stored = _turned(box, self._orientation, self._image.size)
            scale = self._reduce(stored, least if self._orientation < 5 else least[::-1])
            self._image.load()
            left, top, right, bottom = (round(side / scale) for side in stored)
            return np.array(_upright(_to_rgb(self._image.crop((left, top, right, bottom))), self._orientation))

    def _reduce(self, box: Box, least: tuple[int, int]) -> float:
        """Has as few pixels decoded as will do; returns how many go into one, in each direction."""
        # One more, for what rounding may take.
        inner = [(size + 1) / (end - start) for size, start, end in zip(least, box[:2], box[2:], strict=True)]
        width, height = self._image.size
        reduced = self._image.draft(None, (math.ceil(width * inner[0]), math.ceil(height * inner[1])))
        return width / reduced[1][2] if reduced else 1.0


def _turned(box: Box, orientation: int, size: tuple[int, int]) -> Box:
    """A box of an upright image where its file has it, in an image of `size`."""
    left, top, right, bottom = box if orientation < 5 else (box[1], box[0], box[3], box[2])
    if orientation in (2, 3, 7, 8):
        left, right = size[0] - right, size[0] - left
    if orientation in (3, 4, 6, 7):
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation not in _UPRIGHT:
        return image
    image = image.transpose(_UPRIGHT[orientation])
    # It still says that it is to be turned.
    image.info.clear()
    return image


@contextmanager
def opened(source: ImageSource, name: str = "") -> Iterator[Picture]:
    """Opens an image.

    Args:
        source: a path, an encoded file's bytes, an opened image, or the pixels of one, 8-bit [H, W, 3].
        name: what to call it in an error; defaults to the path.

    Raises:
        UnreadableImageError: it is missing, truncated, no image, or no file; the picture's methods raise it as well.
    """
    name = name or (source if isinstance(source, str) else "image")
    if isinstance(source, np.ndarray):
        yield _Decoded(source)
        return
    if isinstance(source, Image.Image):
        with _named(name):
            picture = _Encoded(source, name)
        yield picture
        return
    with _named(name):
        is_file = isinstance(source, bytes) or stat.S_ISREG(Path(source).stat().st_mode)
    if not is_file:
        # To open a pipe is to wait for who writes into it.
        raise UnreadableImageError(f"{name}: not a file")
    with _named(name):
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    with image:
        with _named(name):
            picture = _Encoded(image, name)
        yield picture


def load_rgb(source: ImageSource, name: str = "") -> Image.Image:
    """Decodes an image of any mode (L, LA, RGBA, P, CMYK, I;16, 1, F …) to 8-bit RGB, turned as EXIF says.

    Agrees with `transformers.image_utils.load_image`, except that 16-bit pixels are scaled to 8 bits rather than
    cut off at 255. Arguments and errors are those of `opened`.
    """
    with opened(source, name) as picture:
        return picture.whole()


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Pillow's decoders raise whatever a damaged file leads them to, struct.error and RuntimeError among them.
        raise UnreadableImageError(f"{name}: {type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(np.nan_to_num(np.asarray(image)).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def from_cell(cell: Any) -> tuple[str | bytes | Image.Image, str]:
    """Source and name of an undecoded image cell of `datasets`: `{"path": …, "bytes": …}`, a path or an image."""
    if isinstance(cell, dict):
        path, data = cell.get("path"), cell.get("bytes")
        return (data, path or "") if data is not None else (path or "", path or "")
    return cell, cell if isinstance(cell, str) else ""
