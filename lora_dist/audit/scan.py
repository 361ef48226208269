"""Reads one image file: faults, format, size and hashes. Never raises an exception."""

import base64
import hashlib
import io
import stat
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from lora_dist.data.pixels.conversion import AS_TRANSFORMERS, Conversion, is_deep
from lora_dist.data.pixels.images import UnreadableImageError, deep_pixels, load_rgb

COLORS_SIDE = 16
THUMBNAIL_SIDE = 192
FLAT = 8
"""Largest difference of 255 between the pixels of a nearly constant image, in each channel."""
_SIDE = 32
_BAND = 2**20
_FREQUENCIES = 8
_COSINES = np.cos(np.pi / (2 * _SIDE) * np.outer(np.arange(_FREQUENCIES), 2 * np.arange(_SIDE) + 1))


class Facts(NamedTuple):
    """Facts about a file; an unreadable file has only `fault` and `message`, a readable one only the others.

    Attributes:
        fault: `empty`, `truncated`, `bomb` or `unreadable`.
        format: Pillow's name of the format. `width` and `height` are in pixels, after EXIF rotation.
        digest: Hash of the pixels that training reads; equal for the same image in another format.
        phash: Perceptual hash of 64 bits; resized and compressed copies differ in few of them.
        colors: The image at 16 x 16 pixels, RGB.
        mode: Pillow's name of the mode of an image of more than 8 bits; empty for other images.
        flat: Whether all pixels have nearly the same color in training.
        hidden: Whether the image is transparent and flat, and is not flat on black or white.
    """

    fault: str = ""
    message: str = ""
    format: str = ""
    width: int = 0
    height: int = 0
    digest: bytes = b""
    phash: int = 0
    colors: bytes = b""
    mode: str = ""
    flat: bool = False
    hidden: bool = False


def scan(path: str, conversion: Conversion = AS_TRANSFORMERS) -> Facts:
    """Reads a file like training does."""
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            return Facts("unreadable", "not a file")
        if status.st_size == 0:
            return Facts("empty", "0 bytes")
        image = load_rgb(path, conversion=conversion)
        flat = _is_flat(image)
        with Image.open(path) as opened:
            content, mode = opened.format or "", opened.mode if is_deep(opened) else ""
            transparent = opened.has_transparency_data
        others = (conversion._replace(transparent_background=color) for color in ((0, 0, 0), (255, 255, 255)))
        small = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=2)
        return Facts(
            format=content,
            width=image.width,
            height=image.height,
            digest=_digest(image),
            phash=_phash(small),
            colors=small.resize((COLORS_SIDE, COLORS_SIDE), Image.Resampling.BOX).tobytes(),
            mode=mode,
            flat=flat,
            hidden=flat and transparent and not all(_is_flat(load_rgb(path, conversion=other)) for other in others),
        )
    except UnreadableImageError as error:
        if error.__cause__ is None or isinstance(error.__cause__, UnidentifiedImageError):
            return Facts("unreadable", str(error).removeprefix(f"{path}: "))
        return _fault(error.__cause__)
    except Exception as error:
        return _fault(error)


def _is_flat(image: Image.Image) -> bool:
    return all(high - low <= FLAT for low, high in image.getextrema())  # type: ignore[misc]  # RGB has three


def _fault(error: BaseException) -> Facts:
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return Facts("bomb", message.partition(",")[0])
    if isinstance(error, OSError) and error.strerror:
        return Facts("unreadable", error.strerror)
    return Facts("truncated" if "truncated" in message.lower() else "unreadable", message)


def _digest(image: Image.Image) -> bytes:
    """Hash of size and pixels. Copies bands of rows to save memory."""
    digest = hashlib.blake2b(f"{image.width} {image.height}".encode(), digest_size=16)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        digest.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    return digest.digest()


def _phash(small: Image.Image) -> int:
    """Perceptual hash (pHash, Zauner 2010): one bit per low-frequency DCT coefficient, set if above their median."""
    gray = np.asarray(small.convert("L"), dtype=np.float64)
    lowest = (_COSINES @ gray @ _COSINES.T).ravel()[1:]
    # Without the margin, rounding errors would set the bits of plain images.
    bits = lowest > np.median(lowest) + 1e-6
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


def range_pixels(path: str, conversion: Conversion) -> np.ndarray | None:
    """Pixels of an image of more than 8 bits, for the range of the data set; None for any other image."""
    with warnings.catch_warnings():
        # The report covers what Pillow warns about.
        warnings.simplefilter("ignore")
        return deep_pixels(path, path, conversion)


def thumbnail(path: str, conversion: Conversion = AS_TRANSFORMERS) -> str:
    """A `data:` URL of the image at no more than 192 x 192 pixels; an empty string if it cannot be read."""
    content = io.BytesIO()
    try:
        image = load_rgb(path, conversion=conversion)
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BICUBIC, reducing_gap=2)
        image.save(content, "JPEG", quality=80)
    except Exception:
        # The report is complete without the picture.
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
