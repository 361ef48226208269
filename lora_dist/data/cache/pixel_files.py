"""A file with the pixels of many images, mapped into memory: there whole or not at all, with a digest of each image."""

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash

_ENTRY = np.dtype([("start", "<u8"), ("height", "<u4"), ("width", "<u4"), ("digest", "<u8")])
_FOOTER = struct.Struct("<8sQQ")
_MAGIC = b"pixels01"
_WRITING = ".writing-"


class DamagedFileError(Exception):
    """A file of pixels that is not as it was written; the message names it."""


def write_pixels(path: Path, images: Iterable[np.ndarray | None]) -> None:
    """Writes 8-bit images [h, w, 3] one after the other, their index and a footer; None for an image that is missing.

    Raises:
        OSError: nothing is left of what was written.
    """
    aside = path.with_name(f"{_WRITING}{os.getpid()}-{path.name}")
    entries, start = [], 0
    try:
        with aside.open("wb") as file:
            for image in images:
                pixels = np.ascontiguousarray(np.empty((0, 0, 3), np.uint8) if image is None else image)
                entries.append((start, *pixels.shape[:2], xxhash.xxh3_64_intdigest(pixels.data)))
                file.write(pixels.data)
                start += pixels.nbytes
            index = np.array(entries, _ENTRY).tobytes()
            file.write(index)
            file.write(_FOOTER.pack(_MAGIC, len(entries), xxhash.xxh3_64_intdigest(index)))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def remove_unfinished(directory: Path) -> None:
    """Removes what killed processes left half written."""
    for aside in directory.glob(f"{_WRITING}*"):
        aside.unlink(missing_ok=True)


class PixelFile:
    """Such a file, as images by their places."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            DamagedFileError: the file is missing, or its index is not whole.
        """
        self.path = path
        try:
            # Copies are made of pages that are written to, which are none: torch warns of arrays that cannot be.
            self._bytes = np.memmap(path, np.uint8, "c")
            magic, count, digest = _FOOTER.unpack(self._bytes[-_FOOTER.size :].data)
            index = self._bytes[-_FOOTER.size - count * _ENTRY.itemsize : -_FOOTER.size]
        except (OSError, ValueError, OverflowError, struct.error) as error:
            raise DamagedFileError(f"{path}: {error}") from error
        if magic != _MAGIC or xxhash.xxh3_64_intdigest(index.data) != digest:
            raise DamagedFileError(f"{path}: its index is damaged")
        self._entries = index.view(_ENTRY)
        self._checked = np.zeros(len(self._entries), dtype=bool)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, position: int) -> np.ndarray | None:
        """The image [h, w, 3] in the file, not copied; None if it is missing.

        Raises:
            DamagedFileError: its pixels are not those that were written. This is found when they are first read.
        """
        start, height, width, digest = (int(value) for value in self._entries[position])
        if not height:
            return None
        pixels = self._bytes[start : start + 3 * height * width]
        if not self._checked[position]:
            if xxhash.xxh3_64_intdigest(pixels.data) != digest:
                raise DamagedFileError(f"{self.path}: image {position} in it is damaged")
            self._checked[position] = True
        return pixels.reshape(height, width, 3)
