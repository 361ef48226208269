"""Training images decoded and resized once (`--cache_dir`): built by one process of a node, and read by all."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch.utils.data import Dataset
from tqdm import tqdm

from lora_dist import waiting
from lora_dist.data.cache.pixel_files import DamagedFileError, PixelFile, remove_unfinished, write_pixels
from lora_dist.data.pixels.images import UnreadableImageError, opened
from lora_dist.data.pixels.transforms import interpolated
from lora_dist.data.sampling.order import SampleOrder
from lora_dist.data.sampling.protocol import EncodedSample, Reader
from lora_dist.data.sources.columns import files_of, holds_files
from lora_dist.data.sources.split import Split
from lora_dist.errors import UserError
from lora_dist.processes.workers import POLL_SECONDS, SILENT_SECONDS, from_workers, worker_loader
from lora_dist.storage.disk import SAFETY, free_bytes, readable

logger = logging.getLogger(__name__)

FORMAT = 1
MARGIN = 8 / 7
"""Images are kept this much larger than the model takes them, as far as they are: 256 pixels for 224."""
MOST_PARTS, LEAST_IMAGES = 256, 64
LOOKED_AT = 64
"""Images by which the size of all is judged."""


@dataclass(frozen=True)
class ImageCache:
    """The images of a table, as they are or smaller, in files on the disk.

    Attributes:
        root: directory of all caches.
        images: every row of the table.
        size: height and width that the model takes.
    """

    root: Path
    images: Split
    size: tuple[int, int]

    @cached_property
    def directory(self) -> Path:
        """Where this one is; another one if a file of the data or a setting has changed."""
        return self.root / _fingerprint(self.images, self.size)

    @cached_property
    def rows_in_part(self) -> int:
        """Images in each part but the last."""
        return max(LEAST_IMAGES, -(-len(self.images) // MOST_PARTS))

    @property
    def parts(self) -> range:
        """Numbers of all parts."""
        return range(-(-len(self.images) // self.rows_in_part))

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.directory / f"part-{part:03d}.pixels"

    def rows(self, part: int) -> range:
        """The rows in a part."""
        first = part * self.rows_in_part
        return range(first, min(first + self.rows_in_part, len(self.images)))

    def missing(self) -> list[int]:
        """Parts that are not there whole."""
        return [part for part in self.parts if not self._is_whole(part)]

    def _is_whole(self, part: int) -> bool:
        try:
            return len(PixelFile(self.path(part))) == len(self.rows(part))
        except DamagedFileError:
            return False

    def pixels(self, row: int) -> np.ndarray:
        """An image made anew, 8-bit [h, w, 3]; raises `UnreadableImageError`."""
        one = self.images.read(0, [row])[row]
        with opened(one.source, one.name) as picture:
            height, width = self.kept(picture.size)
            if (width, height) == picture.size:
                return np.asarray(picture.whole())
            part = picture.part((0, 0, *picture.size), (width, height))
            return interpolated(part, (height, width))[0].permute(1, 2, 0).numpy()

    def kept(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that is kept of an image of `size` (width, height)."""
        width, height = size
        scale = min(1.0, MARGIN * max(self.size[0] / height, self.size[1] / width))
        return round(height * scale), round(width * scale)

    def bytes_of(self, rows: int) -> int:
        """About how many bytes that many images take."""
        sizes = []
        for row in range(0, len(self.images), max(1, len(self.images) // LOOKED_AT)):
            one = self.images.read(0, [row])[row]
            try:
                with opened(one.source, one.name) as picture:
                    height, width = self.kept(picture.size)
                    sizes.append(3 * height * width)
            except UnreadableImageError:
                sizes.append(0)
        return int(rows * np.mean(sizes))


def cached(split: Split, root: str, size: tuple[int, int], build: bool) -> "CachedSplit | Split":
    """A training split that is read from a cache. Called on every process.

    Args:
        split: to be cached, with all rows of its table.
        root: directory of all caches.
        size: height and width that the model takes.
        build: make what is missing; if not, the split stays as it is then, and it is only seen whether there is room.

    Raises:
        UserError: the directory cannot be written to, or has no room.
    """
    everything = replace(split, rows=np.arange(len(split.table)), labels=np.zeros(len(split.table), dtype=np.int64))
    cache = ImageCache(Path(root), everything, size)
    if cache.missing():
        try:
            if not build:
                _require_disk_space(cache)
                return split
            cache.directory.mkdir(parents=True, exist_ok=True)
            # The others of a node wait here for the one that builds.
            with waiting.locked(cache.directory / "lock", "builds the cache of images"):
                _build(cache)
        except OSError as error:
            raise UserError(
                f"--cache_dir {root}: cannot write there ({error.strerror or error}); name another directory"
            ) from error
    return CachedSplit(split, cache)


def _build(cache: ImageCache) -> None:
    """Makes the parts that are missing, on all cores."""
    missing = cache.missing()
    if not missing:
        return
    remove_unfinished(cache.directory)
    _require_disk_space(cache)
    workers = min(len(os.sched_getaffinity(0)), len(missing))
    workers = workers if workers > 1 else 0
    loader = worker_loader(_CacheBuilder(cache, missing), workers=workers, batch_size=None, timeout=POLL_SECONDS)
    unreadable, total = 0, sum(len(cache.rows(part)) for part in missing)
    seldom = 0.5 if sys.stderr.isatty() else 60
    with tqdm(total=total, desc="caching images", unit="image", delay=5, mininterval=seldom, file=sys.stderr) as bar:
        for found in from_workers(loader, SILENT_SECONDS):
            if isinstance(found, OSError):
                raise found
            written, bad = found
            unreadable += bad
            bar.update(written)
    logger.info("cached %d images in %s", total, cache.directory)
    if unreadable:
        logger.warning("%d of them cannot be read, and are left to --on_bad_image", unreadable)


def _require_disk_space(cache: ImageCache) -> None:
    needed = int(SAFETY * cache.bytes_of(sum(len(cache.rows(part)) for part in cache.missing())))
    free = free_bytes(cache.directory)
    if needed > free:
        raise UserError(
            f"--cache_dir {cache.root}: {readable(free)} free, and the images take {readable(needed)}. Make room, for "
            f"example by removing caches of other data there, name another disk, or train without a cache"
        )


class _CacheBuilder(Dataset):
    """Parts of a cache, each made by asking for it."""

    def __init__(self, cache: ImageCache, parts: Sequence[int]) -> None:
        self.cache = cache
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> tuple[int, int] | OSError:
        """How many images the part has, and how many of them cannot be read."""
        part = self.parts[index]
        rows, unreadable = self.cache.rows(part), 0

        def images() -> Iterator[np.ndarray | None]:
            nonlocal unreadable
            for row in rows:
                try:
                    yield self.cache.pixels(row)
                except UnreadableImageError:
                    unreadable += 1
                    yield None

        try:
            write_pixels(self.cache.path(part), images())
        except OSError as error:
            return error
        return len(rows), unreadable


@dataclass(frozen=True)
class CachedSplit:
    """A split whose images come from a cache.

    Attributes:
        split: where they come from themselves.
        cache: of all rows of its table.
    """

    split: Split
    cache: ImageCache

    def __len__(self) -> int:
        return len(self.split)

    def name(self, index: int) -> str:
        return self.split.name(index)

    def fingerprint(self) -> str:
        return self.split.fingerprint()

    def describe(self) -> dict[str, Any]:
        return self.split.describe()

    def sample_order(self, seed: int) -> SampleOrder:
        return self.split.sample_order(seed)

    def reader(self) -> Reader:
        return CacheReader(self)


class CacheReader:
    """Reads a cache in one process."""

    def __init__(self, split: CachedSplit) -> None:
        self._split = split.split
        self._cache = split.cache
        self._files: dict[int, PixelFile | None] = {}

    def read(self, epoch: int, rows: Sequence[int]) -> Mapping[int, EncodedSample]:
        return {row: self._sample(epoch, row) for row in rows}

    def _sample(self, epoch: int, index: int) -> EncodedSample:
        row = int(self._split.rows[index])
        part, position = divmod(row, self._cache.rows_in_part)
        if part not in self._files:
            self._files[part] = self._opened(part)
        file = self._files[part]
        try:
            pixels = self._cache.pixels(row) if file is None else file[position]
        except DamagedFileError as error:
            self._files[part] = None
            self._leave(part, error)
            return self._sample(epoch, index)
        except UnreadableImageError:
            pixels = None
        if pixels is None:
            # What could not be read says so again, by its name.
            return self._split.read(epoch, [index])[index]
        return EncodedSample(pixels, "", int(self._split.labels[index]))

    def _opened(self, part: int) -> PixelFile | None:
        try:
            return PixelFile(self._cache.path(part))
        except DamagedFileError as error:
            self._leave(part, error)
            return None

    def _leave(self, part: int, error: DamagedFileError) -> None:
        """Has a part made anew by the next run; this one makes the same pixels as it goes."""
        logger.warning("the cache is damaged, and this part of it is left: %s. The next run makes it anew", error)
        try:
            self._cache.path(part).unlink(missing_ok=True)
        except OSError:
            logger.warning("remove %s by hand", self._cache.path(part))


def _fingerprint(images: Split, size: tuple[int, int]) -> str:
    """Digest of all that decides what is in a cache: the files with their sizes and times, and the size kept."""
    table, column = images.table, images.column
    digest = xxhash.xxh3_128(repr((FORMAT, MARGIN, size, len(table))).encode())
    for file in table.cache_files:
        digest.update(repr((file["filename"], _stamp(file["filename"]))).encode())
    if not holds_files(table, column):
        raise UserError(f"--cache_dir: column {column} holds no image files: train without a cache")
    for path, length in files_of(table, column):
        digest.update(repr((path, _stamp(path) if path and length is None else length)).encode())
    return digest.hexdigest()


def _stamp(path: str) -> tuple[int, int] | None:
    """Size and time of a file, or None where there is none."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
