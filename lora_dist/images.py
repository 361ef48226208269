"""Any image file to upright RGB pixels."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
"""Files of these endings are taken for images, in any case of letters."""


def image_files(directory: str | Path) -> Iterator[str]:
    """Images below a directory, hidden ones left out, in an order that is the same on every machine."""
    for folder, folders, files in os.walk(directory, followlinks=True):
        folders[:] = sorted(inner for inner in folders if not _leads_back(Path(folder, inner)))
        for file in sorted(files):
            if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and not file.startswith("."):
                yield os.path.join(folder, file)


def _leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one on the way to it, where a walk would go round for ever."""
    return folder.is_symlink() and any(parent.resolve() == folder.resolve() for parent in folder.absolute().parents)


class UnreadableImageError(Exception):
    """An image that cannot be decoded; the message names it and says why."""


def load_rgb(source: str | bytes | Image.Image, name: str = "") -> Image.Image:
    """Decodes an image of any mode (L, LA, RGBA, P, CMYK, I;16, 1, F …) to 8-bit RGB, turned as EXIF says.

    Agrees with `transformers.image_utils.load_image`, except that 16-bit pixels are scaled to 8 bits rather than
    cut off at 255.

    Args:
        source: a path, an encoded file's bytes, or an opened image.
        name: what to call it in an error; defaults to the path.

    Raises:
        UnreadableImageError: the file is missing, truncated, or no image.
    """
    name = name or (source if isinstance(source, str) else "image")
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(ImageOps.exif_transpose(source))
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
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
