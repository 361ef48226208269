"""The images to classify: files, or rows of a data set, in an order and under names that stay the same."""

import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from datasets import Dataset, Image

from lora_dist import demo
from lora_dist.data.pixels.images import ImageSource, from_cell
from lora_dist.data.sources.columns import find_image_column, require_image_column
from lora_dist.data.sources.exclusions import absolute
from lora_dist.data.sources.image_files import find_files, warn_of_ignored
from lora_dist.data.sources.load import load_split
from lora_dist.data.sources.shards import Row, ShardIndex, ShardSource, find_source, load_index
from lora_dist.data.sources.split import Split
from lora_dist.errors import UserError
from lora_dist.settings.predict import Images, PredictSettings
from lora_dist.settings.train import DataSettings

logger = logging.getLogger(__name__)

_EXPLANATION = re.compile(r"-[0-9a-f]{8}\.png$")
"""The end of the names that `explain.file_of` gives."""


class NamedImage(NamedTuple):
    """An encoded image, and its name in the output."""

    source: ImageSource
    name: str


class Inputs(Protocol):
    """Images to classify, in order. Each process that reads them has a copy of its own."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[NamedImage]:
        """The images at `indices`.

        Raises:
            UserError: the data set cannot be read.
        """

    def fingerprint(self) -> str:
        """Digest of the names and the order of the images."""


@dataclass(frozen=True)
class Files:
    """Files, named by their `paths`."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> list[NamedImage]:
        return [NamedImage(self.paths[index], self.paths[index]) for index in indices]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(path.encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()


@dataclass(frozen=True)
class TableRows:
    """Rows of a table whose image `column` is undecoded, named by their paths or else by their numbers."""

    table: Dataset
    column: str

    def __len__(self) -> int:
        return len(self.table)

    def read(self, indices: Sequence[int]) -> list[NamedImage]:
        rows = [int(index) for index in indices]
        found = []
        for row, cell in zip(rows, self.table[rows][self.column], strict=True):
            source, inner = from_cell(cell)
            found.append(NamedImage(source, inner if isinstance(source, str) and inner else _row_name(row, inner)))
        return found

    def fingerprint(self) -> str:
        return Split(self.table, self.column, np.arange(len(self)), np.zeros(len(self), np.int64)).fingerprint()


def _row_name(row: int, inner: str, file: str = "") -> str:
    """Name of a row, with its file and with the name of the image in it where there are any."""
    return f"{file} row {row}".lstrip() + (f" ({inner})" if inner else "")


class StreamedRows:
    """Rows of shards, one shard after another, named by file and row. A call continues where the last one ended."""

    def __init__(self, source: ShardSource, index: ShardIndex) -> None:
        self._source, self._index = source, index
        self._ends = np.cumsum(index.sizes)
        self._open: tuple[int, int, Iterator[Row]] | None = None
        """The shard that is open, the row in it that comes next, and its rows from there on."""

    def __len__(self) -> int:
        return int(self._index.sizes.sum())

    def read(self, indices: Sequence[int]) -> list[NamedImage]:
        return [self._read(int(index)) for index in indices]

    def _read(self, index: int) -> NamedImage:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        position = index - int(self._ends[shard] - self._index.sizes[shard])
        file = self._source.files[self._index.files[shard]]
        name = os.path.basename(file)
        row = int(self._index.first_rows[shard]) + position
        try:
            source, inner = from_cell(self._row(shard, position).cell)
        except Exception as error:
            # Decoders and networks raise errors of many classes.
            raise UserError(f"cannot read {file} row {row}: {type(error).__name__}: {error}") from error
        return NamedImage(source, _row_name(row, inner, name))

    def _row(self, shard: int, position: int) -> Row:
        if self._open is None or self._open[0] != shard or self._open[1] > position:
            rows = self._source.read(int(self._index.files[shard]), int(self._index.groups[shard]), position)
            self._open = shard, position, rows
        _, following, rows = self._open
        self._open = None
        for _ in range(position - following):
            next(rows)
        found = next(rows, None)
        if found is None:
            raise EOFError("the file has changed since it was indexed")
        self._open = shard, position + 1, rows
        return found

    def fingerprint(self) -> str:
        # A URL of the Hub contains the commit.
        local = {file: Path(file) for file in self._source.files if "://" not in file}
        files = [
            (local[file].name, local[file].stat().st_size) if file in local else file for file in self._source.files
        ]
        return hashlib.sha256(f"{self._index.digest} {files}".encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}


def files_of(inputs: Inputs) -> Sequence[str]:
    """Returns the paths of images that are files; none for the rows of a data set."""
    return inputs.paths if isinstance(inputs, Files) else []


def find_inputs(settings: PredictSettings) -> Inputs:
    """Finds the images that the settings name; there are none without such a setting.

    Raises:
        UserError: a name stands for no image, or a list or data set cannot be read.
    """
    if settings.data.dataset_name:
        return _find_rows(settings)
    images = settings.images
    found = find_images([demo.local_path(name) for name in images.images])
    paths = _not_written_by(images, found)
    if found and not paths:
        raise UserError("--images has only pictures that --explain or --grid of this command write")
    if left_out := len(found) - len(paths):
        logger.info("left out %s pictures that --explain or --grid of this command write", f"{left_out:,}")
    listed = read_list(images.images_from) if images.images_from else []
    # Each alone is without repeats, and looking for them in a million names takes memory.
    return Files(_once([*paths, *listed]) if paths and listed else [*paths, *listed])


def _not_written_by(images: Images, paths: Sequence[str]) -> list[str]:
    """The paths without the pictures that a command with these settings writes, and perhaps has written before."""
    grid, maps = (absolute(name) if name else None for name in (images.grid, images.explain))
    if not (grid or maps):
        return list(paths)

    def is_written(whole: str) -> bool:
        directory, name = os.path.split(whole)
        return whole == grid or (directory == maps and bool(_EXPLANATION.search(name)))

    return [path for path in paths if not is_written(absolute(path))]


def _once(paths: Iterable[str]) -> list[str]:
    """Each file once, under the first of its paths; links are not followed."""
    first: dict[str, str] = {}
    for path in paths:
        whole = absolute(path)
        if os.pardir in path:  # "link/.." is not always where the link is
            directory, name = os.path.split(path)
            whole = os.path.join(os.path.realpath(directory), name)
        # One object for equal texts takes less memory.
        first.setdefault(path if path == whole else whole, path)
    return list(first.values())


def _find_rows(settings: PredictSettings) -> Inputs:
    data = settings.data
    known = DataSettings(
        dataset_name=data.dataset_name,
        dataset_config_name=data.dataset_config_name,
        train_split=data.dataset_split or "",
        image_column_name=data.image_column_name,
        streaming=data.streaming,
    )
    if data.streaming:
        source = find_source(known, with_labels=False)
        streamed = StreamedRows(source, load_index(source))
        _require_rows(len(streamed), data.dataset_name, data.dataset_split)
        return streamed
    table = load_split(known, known.train_split)
    column = data.image_column_name or find_image_column(table.features)
    require_image_column(table.features, column)
    _require_rows(len(table), data.dataset_name, data.dataset_split)
    table = table.select_columns([column])
    if isinstance(table.features[column], Image) or isinstance(table[0][column], str):
        table = table.cast_column(column, Image(decode=False))
    return TableRows(table, column)


def _require_rows(count: int, name: str | None, split: str | None) -> None:
    if not count:
        raise UserError(f"split {split!r} of data set {name!r} has no rows")


def find_images(names: Sequence[str]) -> list[str]:
    """Lists the files of `names` (files, folders with all below them, glob patterns), in this order and each once.

    Raises:
        UserError: a name matches no image.
    """
    found: list[str] = []
    for name in names:
        # `Path.is_dir` fails on a name that is too long.
        if os.path.isdir(name):  # noqa: PTH112
            files, ignored = find_files(name)
            warn_of_ignored(name, ignored)
        else:
            files = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        if not files:
            raise UserError(f"--images {name}: no images found")
        found.extend(files)
    return _once(found)


def read_list(file: str) -> list[str]:
    """Reads paths, one per line, relative to the current directory; repeated paths are left out.

    The files are not opened: a missing one gets a row with its error, as a damaged one does.

    Raises:
        UserError: the list cannot be read, or names no file.
    """
    try:
        text = Path(file).read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"--images_from {file}: {error.strerror}") from error
    if "\0" in text:
        raise UserError(f"--images_from {file}: not a text file with one path per line")
    listed = [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line.strip()]
    paths = _once(listed)
    if not paths:
        raise UserError(f"--images_from {file}: the list names no file")
    if len(paths) < len(listed):
        logger.info("--images_from %s: %d of %d lines repeat a path", file, len(listed) - len(paths), len(listed))
    return paths
