"""Files of decoded images, mapped into memory. They are written atomically, and checked by their size and footer."""

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_FOOTER = struct.Struct("<8sQ8x")
"""Magic and number of images; version 01 has a digest of the index at the end."""
_MAGIC = b"pixels02"
_FIELDS = [("start", "<u8"), ("height", "<u4"), ("width", "<u4")]
_ENTRY = {_MAGIC: np.dtype(_FIELDS), b"pixels01": np.dtype([*_FIELDS, ("digest", "<u8")])}
_WRITING = ".writing-"


class DamagedFileError(Exception):
    """A file of pixels that is missing or incomplete; the message names it."""


def write_pixels(path: Path, images: Iterable[np.ndarray | None]) -> None:
    """Writes 8-bit images [h, w, 3], their index and a footer; None for an image that is missing.

    Raises:
        OSError: the unfinished file is removed.
    """
    aside = path.with_name(f"{_WRITING}{os.getpid()}-{path.name}")
    entries, start = [], 0
    try:
        with aside.open("wb") as file:
            for image in images:
                pixels = np.ascontiguousarray(np.empty((0, 0, 3), np.uint8) if image is None else image)
                entries.append((start, *pixels.shape[:2]))
                file.write(pixels.data)
                start += pixels.nbytes
            file.write(np.array(entries, _ENTRY[_MAGIC]).tobytes())
            file.write(_FOOTER.pack(_MAGIC, len(entries)))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def remove_unfinished(directory: Path) -> None:
    """Removes the unfinished files of killed processes."""
    for aside in directory.glob(f"{_WRITING}*"):
        aside.unlink(missing_ok=True)


class PixelFile:
    """A sequence of the images in a file."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            DamagedFileError: the file is missing, or its size contradicts its index and footer.
        """
        try:
            # Nothing writes to the pages; torch warns of arrays that are read-only.
            self._bytes = np.memmap(path, np.uint8, "c")
            magic, count = _FOOTER.unpack(self._bytes[-_FOOTER.size :].data)
            end = len(self._bytes) - _FOOTER.size - count * _ENTRY[magic].itemsize
            self._entries = self._bytes[max(end, 0) : -_FOOTER.size].view(_ENTRY[magic])
        except (OSError, ValueError, KeyError, OverflowError, struct.error) as error:
            raise DamagedFileError(f"{path}: {error}") from error
        sizes = 3 * self._entries["height"].astype(np.int64) * self._entries["width"]
        if sizes.sum() != end or not np.array_equal(self._entries["start"], np.cumsum(sizes) - sizes):
            raise DamagedFileError(f"{path}: its index and its size of {len(self._bytes)} bytes contradict each other")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, position: int) -> np.ndarray | None:
        """The image [h, w, 3], not copied; None if it is missing."""
        start, height, width = (int(self._entries[position][name]) for name, _ in _FIELDS)
        if not height * width:
            return None
        return self._bytes[start : start + 3 * height * width].reshape(height, width, 3)
