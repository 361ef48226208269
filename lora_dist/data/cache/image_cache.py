"""Training images decoded and resized once (`--cache_dir`): one process of a node builds the cache, and all read it."""

import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from lora_dist import waiting
from lora_dist.data.cache.pixel_files import DamagedFileError, PixelFile, remove_unfinished, write_pixels
from lora_dist.data.pixels.conversion import AS_TRANSFORMERS, Conversion
from lora_dist.data.pixels.images import Picture, UnreadableImageError, opened
from lora_dist.data.pixels.transforms import interpolated
from lora_dist.data.sampling.training_split import EncodedSample, Reader
from lora_dist.data.sources.columns import files_of, holds_files
from lora_dist.data.sources.split import Split
from lora_dist.errors import UserError
from lora_dist.processes.cores import available_cores
from lora_dist.processes.workers import POLL_SECONDS, SILENT_SECONDS, from_workers, worker_loader
from lora_dist.storage.disk import SAFETY, free_bytes, readable

logger = logging.getLogger(__name__)

FORMAT = 1
MARGIN = 8 / 7
"""Size of cached images relative to the model input: 256 pixels for 224. Smaller images are not enlarged."""
MAX_FILES, MIN_IMAGES = 256, 64
MEASURED_IMAGES = 64


@dataclass(frozen=True)
class ImageCache(Dataset):
    """The images of a table, full size or smaller, in numbered files; indexing with the number of a file builds it.

    Attributes:
        root: directory of all caches.
        images: all rows of the table.
        size: height and width of the model input.
        conversion: how the images become 8-bit RGB.
    """

    root: Path
    images: Split
    size: tuple[int, int]
    conversion: Conversion = AS_TRANSFORMERS

    @cached_property
    def directory(self) -> Path:
        """Directory of this cache; it changes with the files of the data, `size` and `conversion`."""
        return self.root / _fingerprint(self.images, self.size, self.conversion)

    @cached_property
    def images_per_file(self) -> int:
        """Images in each file but the last."""
        return max(MIN_IMAGES, -(-len(self.images) // MAX_FILES))

    def path(self, number: int) -> Path:
        """The path of a file."""
        return self.directory / f"part-{number:03d}.pixels"

    def table_rows(self, number: int) -> range:
        """Rows of the table in a file."""
        return range(len(self.images))[number * self.images_per_file :][: self.images_per_file]

    def __getitem__(self, number: int) -> tuple[int, int] | OSError:
        """Builds file `number`, so that workers of a `DataLoader` can build files at the same time.

        Returns:
            The number of its images and how many of them are unreadable; or the error that kept it from being written.
        """
        table_rows, unreadable = self.table_rows(number), 0

        def images() -> Iterator[np.ndarray | None]:
            nonlocal unreadable
            for table_row in table_rows:
                try:
                    yield self.pixels(table_row)
                except UnreadableImageError:
                    unreadable += 1
                    yield None

        try:
            write_pixels(self.path(number), images())
        except OSError as error:
            return error
        return len(table_rows), unreadable

    def missing(self) -> list[int]:
        """Numbers of the files that are missing or damaged."""
        return [number for number in range(-(-len(self.images) // self.images_per_file)) if not self._is_whole(number)]

    def _is_whole(self, number: int) -> bool:
        try:
            return len(PixelFile(self.path(number))) == len(self.table_rows(number))
        except DamagedFileError:
            return False

    @contextmanager
    def _opened(self, table_row: int) -> Iterator[Picture]:
        sample = self.images.read(0, [table_row])[table_row]
        with opened(sample.source, sample.name, self.conversion) as picture:
            yield picture

    def pixels(self, table_row: int) -> np.ndarray:
        """Decodes and resizes an image, 8-bit [h, w, 3]; raises `UnreadableImageError`."""
        with self._opened(table_row) as picture:
            height, width = self.kept(picture.size)
            if (width, height) == picture.size:
                return np.asarray(picture.whole())
            part = picture.part((0, 0, *picture.size), (width, height))
            return interpolated(part, (height, width))[0].permute(1, 2, 0).numpy()

    def kept(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in the cache of an image of `size` (width, height)."""
        width, height = size
        scale = min(1.0, MARGIN * max(self.size[0] / height, self.size[1] / width))
        return round(height * scale), round(width * scale)

    def bytes_of(self, count: int) -> int:
        """Approximate bytes of `count` images, from the sizes of some."""
        sizes = []
        for table_row in range(0, len(self.images), max(1, len(self.images) // MEASURED_IMAGES)):
            try:
                with self._opened(table_row) as picture:
                    sizes.append(3 * math.prod(self.kept(picture.size)))
            except UnreadableImageError:
                sizes.append(0)
        return int(count * np.mean(sizes))


def cached(
    split: Split, root: str, size: tuple[int, int], build: bool, conversion: Conversion = AS_TRANSFORMERS
) -> Split:
    """A training split that is read from a cache of all rows of its table, in `root`. Called on every process.

    Args:
        split: any samples of its table.
        root: directory of all caches.
        size: height and width of the model input.
        build: build what is missing; if False, only check the disk space, and return `split` for an incomplete cache.
        conversion: how the images become 8-bit RGB.

    Raises:
        UserError: the directory is not writable, or the disk has too little space.
    """
    count = len(split.table)
    everything = replace(split, table_rows=np.arange(count), labels=np.zeros(count, dtype=np.int64))
    cache = ImageCache(Path(root), everything, size, conversion)
    if cache.missing():
        try:
            if not build:
                _require_disk_space(cache)
                return split
            cache.directory.mkdir(parents=True, exist_ok=True)
            # The other processes of a node wait here for the one that builds.
            with waiting.locked(cache.directory / "lock", "builds the cache of images"):
                _build(cache)
        except OSError as error:
            raise UserError(
                f"--cache_dir {root}: cannot write there ({error.strerror or error}); name another directory"
            ) from error
    return CachedSplit(split.table, split.column, split.table_rows, split.labels, cache)


def _build(cache: ImageCache) -> None:
    """Builds the missing files on all cores."""
    missing = cache.missing()
    if not missing:
        return
    if damaged := [path for path in map(cache.path, missing) if path.exists()]:
        logger.warning("rebuilding %d damaged files of the image cache, the first is %s", len(damaged), damaged[0])
    remove_unfinished(cache.directory)
    _require_disk_space(cache)
    workers = min(available_cores(), len(missing))
    workers = workers if workers > 1 else 0
    loader = worker_loader(Subset(cache, missing), workers=workers, batch_size=None, timeout=POLL_SECONDS)
    unreadable, total = 0, sum(len(cache.table_rows(number)) for number in missing)
    interval = 0.5 if sys.stderr.isatty() else 60
    with tqdm(total=total, desc="caching images", unit="image", delay=5, mininterval=interval, file=sys.stderr) as bar:
        for found in from_workers(loader, SILENT_SECONDS):
            if isinstance(found, OSError):
                raise found
            written, bad = found
            unreadable += bad
            bar.update(written)
    logger.info("cached %d images in %s", total, cache.directory)
    if unreadable:
        logger.warning("%d of them cannot be read; --on_bad_image decides what training does with these", unreadable)


def _require_disk_space(cache: ImageCache) -> None:
    needed = int(SAFETY * cache.bytes_of(sum(len(cache.table_rows(number)) for number in cache.missing())))
    free = free_bytes(cache.directory)
    if needed > free:
        raise UserError(
            f"--cache_dir {cache.root}: {readable(free)} free, and the images take {readable(needed)}. Free some "
            f"space, for example by removing caches of other data there, name another disk, or train without a cache"
        )


@dataclass(frozen=True)
class CachedSplit(Split):
    """A split whose reader takes the images from a cache."""

    cache: ImageCache

    def reader(self) -> Reader:
        return CacheReader(self)


class CacheReader:
    """Reads a cache in one process."""

    def __init__(self, split: CachedSplit) -> None:
        self._split = split
        self._cache = split.cache
        self._files: dict[int, PixelFile | None] = {}

    def read(self, epoch: int, indices: Sequence[int]) -> Mapping[int, EncodedSample]:
        return {index: self._sample(epoch, index) for index in indices}

    def _sample(self, epoch: int, index: int) -> EncodedSample:
        table_row = int(self._split.table_rows[index])
        number, position = divmod(table_row, self._cache.images_per_file)
        if number not in self._files:
            try:
                self._files[number] = PixelFile(self._cache.path(number))
            except DamagedFileError as error:
                self._files[number] = None
                logger.warning("ignoring a damaged file of the image cache; the next run rebuilds it: %s", error)
        file, pixels = self._files[number], None
        with suppress(UnreadableImageError):
            pixels = self._cache.pixels(table_row) if file is None else file[position]
        if pixels is None:
            # The source raises the error again, with its name.
            return self._split.read(epoch, [index])[index]
        return EncodedSample(pixels, "", self._split.labels[index])


def _fingerprint(images: Split, size: tuple[int, int], conversion: Conversion) -> str:
    """Digest of all that a cache depends on: the files with their sizes and times, the size and conversion."""
    table, column = images.table, images.column
    digest = xxhash.xxh3_128(repr((FORMAT, MARGIN, size, len(table))).encode())
    if conversion != AS_TRANSFORMERS:
        # Caches of older releases have no conversion in their digest.
        digest.update(repr(tuple(conversion) if conversion.all_depths else conversion[:2]).encode())
    for file in table.cache_files:
        digest.update(repr((file["filename"], _stamp(file["filename"]))).encode())
    if not holds_files(table, column):
        raise UserError(f"--cache_dir: column {column} holds no image files: train without a cache")
    for path, length in files_of(table, column):
        digest.update(repr((path, _stamp(path) if path and length is None else length)).encode())
    return digest.hexdigest()


def _stamp(path: str) -> tuple[int, int] | None:
    """Size and modification time of a file; None if it does not exist."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
