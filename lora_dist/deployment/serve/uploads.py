"""Decodes uploaded bytes to RGB images; refuses oversized, damaged and other files with an HTTP status."""

import io
import re
import warnings

from PIL import Image, UnidentifiedImageError

from lora_dist.data.pixels.conversion import AS_TRANSFORMERS, Conversion
from lora_dist.data.pixels.images import UnreadableImageError, load_rgb

Image.init()
FORMATS: list[str] = [name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF") if name in Image.OPEN]
"""Formats that browsers show; further decoders would only add attack surface."""
MAX_NAME_LENGTH = 255


class RefusedUploadError(Exception):
    """Raised for an upload that is not classified, with a 4xx `status`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_name(name: str) -> str:
    """Returns a plain file name unchanged.

    Raises:
        RefusedUploadError: 400 for a path, control characters, or more than 255 characters.
    """
    if len(name) > MAX_NAME_LENGTH or re.search(r"[/\\\x00-\x1f\x7f]", name) or name in ("", ".", ".."):
        raise RefusedUploadError(400, f"{name[:MAX_NAME_LENGTH]!r} is not a plain file name")
    return name


def decode(data: bytes, name: str, max_pixels: int, conversion: Conversion = AS_TRANSFORMERS) -> Image.Image:
    """Decodes an image to upright RGB; checks the size in the header before allocating pixels.

    Raises:
        RefusedUploadError: 413 for too many pixels, 415 for an unsupported format, 422 for an empty or damaged file.
    """
    if not data:
        raise RefusedUploadError(422, f"{name}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise RefusedUploadError(415, f"{name}: not an image of type {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise RefusedUploadError(413, f"{name}: {error}") from error
    except Exception as error:
        # Decoders raise any exception on a damaged file.
        raise RefusedUploadError(422, f"{name}: {type(error).__name__}: {error}") from error
    with image:
        if image.width * image.height > max_pixels:
            raise RefusedUploadError(
                413, f"{name}: {image.width} x {image.height} pixels, more than {max_pixels / 1e6:g} megapixels"
            )
        try:
            return load_rgb(image, name, conversion)
        except UnreadableImageError as error:
            raise RefusedUploadError(422, str(error)) from error
