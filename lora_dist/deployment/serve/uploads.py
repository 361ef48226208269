"""Bytes from strangers to RGB images: what is too large, no image or damaged is refused with its HTTP status."""

import io
import re
import warnings
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from lora_dist.data.pixels.images import UnreadableImageError, load_rgb

Image.init()
FORMATS: list[str] = [name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF") if name in Image.OPEN]
"""What browsers show. Each decoder more is one more to attack; SVG has none in Pillow."""
LONGEST_NAME = 255


class Limits(NamedTuple):
    """What a request may hold.

    Attributes:
        body: bytes of a request.
        pixels: of an image, whatever its file holds.
        files: images in a request.
    """

    body: int
    pixels: int
    files: int


class RefusedUploadError(Exception):
    """An upload that is not classified.

    Attributes:
        status: of HTTP, 4xx.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_name(name: str) -> str:
    """The name of a file, which is only ever shown.

    Raises:
        RefusedUploadError: 400 for a path, control characters, or more than 255 characters.
    """
    if len(name) > LONGEST_NAME or re.search(r"[/\\\x00-\x1f\x7f]", name) or name in ("", ".", ".."):
        raise RefusedUploadError(400, f"{name[:LONGEST_NAME]!r} is no plain file name")
    return name


def decode(data: bytes, name: str, most_pixels: int) -> Image.Image:
    """Upright RGB. The number of pixels is read from the header, before memory is taken for them.

    Args:
        data: of the file.
        name: for messages.
        most_pixels: that the image may have.

    Raises:
        RefusedUploadError: 413 for too many pixels, 415 for none of `FORMATS`, 422 for an empty or damaged file.
    """
    if not data:
        raise RefusedUploadError(422, f"{name}: the file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow warns of what is refused here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise RefusedUploadError(415, f"{name}: not an image of type {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise RefusedUploadError(413, f"{name}: {error}") from error
    except Exception as error:
        # As in `load_rgb`: decoders raise whatever a damaged file leads them to.
        raise RefusedUploadError(422, f"{name}: {type(error).__name__}: {error}") from error
    with image:
        if image.width * image.height > most_pixels:
            raise RefusedUploadError(
                413, f"{name}: {image.width} x {image.height} pixels, and {most_pixels / 1e6:g} megapixels are allowed"
            )
        try:
            return load_rgb(image, name)
        except UnreadableImageError as error:
            raise RefusedUploadError(422, str(error)) from error
