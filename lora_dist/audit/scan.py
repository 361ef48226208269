"""What one file is: whether it can be read, what its pixels are, what it looks like. Whatever it holds, no error."""

import hashlib
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from lora_dist.data.pixels.images import UnreadableImageError, load_rgb

COLORS_SIDE = 16
_SIDE = 32
_BAND = 2**20
_FREQUENCIES = 8
_COSINES = np.cos(np.pi / (2 * _SIDE) * np.outer(np.arange(_FREQUENCIES), 2 * np.arange(_SIDE) + 1))


class Facts(NamedTuple):
    """What is known of a file. If it cannot be read, `fault` and `message` alone.

    Attributes:
        fault: why it cannot be read (`empty`, `truncated`, `bomb` or `unreadable`), or an empty string.
        message: the same in words.
        format: of the content, as Pillow calls it.
        width: in pixels, upright.
        height: in pixels, upright.
        digest: of the pixels that training sees; equal for the same picture in another file or format.
        look: perceptual hash of 64 bits; few of them differ between copies that were resized or compressed.
        colors: the image at 16 x 16 pixels, RGB.
    """

    fault: str = ""
    message: str = ""
    format: str = ""
    width: int = 0
    height: int = 0
    digest: bytes = b""
    look: int = 0
    colors: bytes = b""


def scan(path: str) -> Facts:
    """Reads a file as training does."""
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            return Facts("unreadable", "not a file")
        if status.st_size == 0:
            return Facts("empty", "0 bytes")
        image = load_rgb(path)
        with Image.open(path) as opened:
            content = opened.format or ""
        small = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=2)
        return Facts(
            format=content,
            width=image.width,
            height=image.height,
            digest=_digest(image),
            look=_look(small),
            colors=small.resize((COLORS_SIDE, COLORS_SIDE), Image.Resampling.BOX).tobytes(),
        )
    except UnreadableImageError as error:
        return _fault(error.__cause__ or error)
    except Exception as error:
        return _fault(error)


def _fault(error: BaseException) -> Facts:
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return Facts("bomb", message.partition(",")[0])
    if isinstance(error, UnidentifiedImageError):
        return Facts("unreadable", "no image of a known format")
    if isinstance(error, OSError) and error.strerror:
        return Facts("unreadable", error.strerror)
    return Facts("truncated" if "truncated" in message.lower() else "unreadable", message)


def _digest(image: Image.Image) -> bytes:
    """Of size and pixels. An image can be large, so its rows are copied out a few at a time."""
    digest = hashlib.blake2b(f"{image.width} {image.height}".encode(), digest_size=16)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        digest.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    return digest.digest()


def _look(small: Image.Image) -> int:
    """The signs of the lowest frequencies about their median ("pHash", Zauner 2010)."""
    gray = np.asarray(small.convert("L"), dtype=np.float64)
    lowest = (_COSINES @ gray @ _COSINES.T).ravel()[1:]
    # Not to be decided by rounding where there is nothing to see.
    bits = lowest > np.median(lowest) + 1e-6
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")
