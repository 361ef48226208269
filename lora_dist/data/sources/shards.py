"""The shards of a streamed data set: finds them on the Hub or on disk, indexes them, and reads them.

A shard can be read without what precedes it: it is a row group of a parquet file, or a whole tar file.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetBuilder, Features, IterableDataset, config, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from datasets.utils.file_utils import xopen
from tqdm import tqdm

from lora_dist import hub_client, waiting
from lora_dist.data.sources.class_numbers import require_same_numbers, require_same_numbers_in
from lora_dist.data.sources.columns import (
    feature_of,
    field_of,
    find_image_column,
    find_label_column,
    has_label,
    path_of,
    require_columns,
    require_image_column,
    require_labels,
)
from lora_dist.data.sources.datasets_cache import with_writable_cache
from lora_dist.errors import UserError
from lora_dist.settings.train import DataSettings
from lora_dist.storage.atomic import replace_file

logger = logging.getLogger(__name__)
FORMATS = ("parquet", "webdataset")
ROWS = 1000
"""Rows of a batch where `datasets` cannot choose a number."""
READ_ROWS = 16
READ_BYTES = 2**20
"""Bytes of a row group that are fetched at a time. A row group can have gigabytes, and each lane has one open."""
SURVEY_READ_BYTES = 2**16
THREADS = 16

_ADVICE = {
    "WebDataset format": "Each sample needs files of the same extensions, in the same case: name all images .jpg, for "
    "example, and all labels .cls",
    "with base 10: b'": "A .cls file holds a number: write names of classes as .txt, and set --label_column_name txt",
    "corresponds to no data": "Its files have no rows: remove the split, or add rows",
    "BatchSize must be greater": "A file has no rows: remove it",
}
"""Advice on errors of `datasets`: each key is a part of the message of an error."""


class Row(NamedTuple):
    """One row of a shard: the undecoded image cell, and the label value, or None where labels are not read."""

    cell: Any
    label: Any = None


@dataclass(frozen=True)
class ShardSource:
    """The files of a split, as paths or URLs, and the same as one `stream` for its features and for reading tar files.

    `format` is one of `FORMATS`. `label_column` is None where labels are not read.
    """

    format: str
    files: list[str]
    stream: IterableDataset
    image_column: str
    label_column: str | None

    @property
    def label_feature(self) -> Any:
        """The feature of the label column; None without one."""
        return feature_of(self.stream.features, self.label_column) if self.label_column else None

    @property
    def _path_of_label(self) -> list[str]:
        """The column of labels, and the fields in it that lead to the label."""
        return path_of(self.stream.features, self.label_column) if self.label_column else []

    def survey(self, file: int) -> tuple[list[int], list[Any]]:
        """Rows in each shard of a file, and the labels of all its rows. Parquet files are read in this column only."""
        column, *fields = self._path_of_label or [self.image_column]
        if self.format != "parquet":
            # Without labels, to count the rows.
            labels = [
                field_of(value, fields) if self.label_column else None for (value,) in self._rows_of_tar(file, [column])
            ]
            return [len(labels)], labels if self.label_column else []
        with xopen(self.files[file], "rb", block_size=SURVEY_READ_BYTES) as opened, _parquet(opened) as parquet:
            require_same_numbers(parquet.schema_arrow, self.stream.features, self.files[file])
            groups = range(parquet.num_row_groups)
            if self.label_column is None:
                return [parquet.metadata.row_group(group).num_rows for group in groups], []
            batches = parquet.iter_batches(row_groups=list(groups), columns=[column], use_threads=False)
            labels = [field_of(value, fields) for batch in batches for value in batch.column(0).to_pylist()]
            return [parquet.metadata.row_group(group).num_rows for group in groups], labels

    def read(self, file: int, group: int, start: int) -> Iterator[Row]:
        """The rows of a shard from `start` on."""
        columns = [self.image_column, *self._path_of_label[:1]]
        for row in self._rows(file, group, start, columns):
            yield Row(row[0], *(field_of(value, self._path_of_label[1:]) for value in row[1:]))

    def _rows(self, file: int, group: int, start: int, columns: list[str]) -> Iterator[tuple[Any, ...]]:
        if self.format != "parquet":
            yield from self._rows_of_tar(file, columns, start)
            return
        with xopen(self.files[file], "rb") as opened, _parquet(opened) as parquet:
            # A thread that still holds the file when the process ends would abort it (apache/arrow#45214).
            for batch in parquet.iter_batches(READ_ROWS, row_groups=[group], columns=columns, use_threads=False):
                kept = batch.slice(min(start, len(batch)))
                start = max(start - len(batch), 0)
                yield from zip(*(kept.column(name).to_pylist() for name in columns), strict=True)

    def _rows_of_tar(self, file: int, columns: list[str], start: int = 0) -> Iterator[tuple[Any, ...]]:
        tar = self.stream.shard(len(self.files), file).select_columns(columns).decode(False)
        # Iterating over samples would split the shard among the worker processes of a DataLoader; `iter` does not.
        with closing(tar.skip(start).iter(READ_ROWS)) as batches:
            for batch in batches:
                yield from zip(*(batch[name] for name in columns), strict=True)


def _parquet(opened: Any) -> pq.ParquetFile:
    return pq.ParquetFile(opened, pre_buffer=False, buffer_size=READ_BYTES)


def find_source(settings: DataSettings, with_labels: bool = True) -> ShardSource:
    """Finds the files of the training split, and reads their features only.

    Raises `UserError` if the data set or split does not exist, cannot be streamed, or lacks a column. Without
    `with_labels`, no column of labels is needed.
    """
    name, config_name, split = settings.dataset_name, settings.dataset_config_name, settings.train_split
    file_format, files, _ = _find_files(settings, split)
    with reading_data(name, split):
        stream = with_writable_cache(
            lambda cache: load_dataset(name, config_name, split=split, streaming=True, cache_dir=cache)
        )
    features = stream.features or {}
    image_column = settings.image_column_name or find_image_column(features)
    if not with_labels:
        require_image_column(features, image_column)
        return ShardSource(file_format, files, stream, image_column, None)
    label_column = settings.label_column_name or find_label_column(features)
    require_columns(features, image_column, label_column)
    return ShardSource(file_format, files, stream, image_column, label_column)


def load_alone(settings: DataSettings, split: str) -> Dataset:
    """Loads a split, or a slice of one, without downloading the other splits as `load_dataset` does."""
    base = split.partition("[")[0]
    file_format, files, features = _find_files(settings, base)
    options = options_for(files) if file_format == "parquet" else {}
    with reading_data(settings.dataset_name, split):
        table = with_writable_cache(
            lambda cache: load_dataset(
                file_format, data_files={base: files}, split=split, features=features, cache_dir=cache, **options
            )
        )
        if file_format == "parquet":
            require_same_numbers_in(files, table.features)
        return table


def local_parquet_files(settings: DataSettings) -> dict[str, list[str]]:
    """The parquet files of each split in a local directory; none of other data sets."""
    if not Path(settings.dataset_name or "").is_dir():
        return {}
    builder = _builder(settings, settings.train_split)
    if builder.name != "parquet":
        return {}
    return {str(split): list(map(str, files)) for split, files in builder.config.data_files.items()}


def options_for(files: Iterable[str]) -> dict[str, int]:
    """Options of `load_dataset` for parquet files on this machine that begin with an empty row group, if there are any.

    `datasets` reads a file in batches of the size of its first row group, which cannot be 0.

    Raises:
        UserError: a file is damaged.
    """
    is_empty = False
    for file in (file for file in files if Path(file).is_file()):
        try:
            metadata = pq.read_metadata(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"cannot read {file}: {error}. Remove the file, or write it again") from error
        is_empty |= metadata.num_row_groups > 0 and metadata.row_group(0).num_rows == 0
    return {"batch_size": ROWS} if is_empty else {}


def _find_files(settings: DataSettings, split: str) -> tuple[str, list[str], Features | None]:
    """Format, files and declared features of a split."""
    name = settings.dataset_name
    builder = _builder(settings, split)
    if builder.name == "cache":
        raise UserError(
            f"{name} is not available from the Hub now, and the local cache has no shards that can be streamed: remove "
            f"--streaming"
        )
    if builder.name not in FORMATS:
        raise UserError(
            f"--streaming reads parquet files and WebDataset tar files, and {name} is of format {builder.name}. "
            f"Remove --streaming, or write the data as parquet: load_dataset({name!r}, …).to_parquet(…)"
        )
    files = {str(part): list(found) for part, found in (builder.config.data_files or {}).items()}
    if split not in files:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(files)}. Slices cannot be streamed.")
    return builder.name, files[split], builder.info.features


def _builder(settings: DataSettings, split: str) -> DatasetBuilder:
    """What `datasets` knows about a data set before it reads its rows."""
    name, config_name = settings.dataset_name, settings.dataset_config_name
    assert name is not None
    with reading_data(name, split):
        return with_writable_cache(lambda cache: load_dataset_builder(name, config_name, cache_dir=cache))


@contextmanager
def reading_data(name: str | None, split: str) -> Iterator[None]:
    """`hub_client.reading` for a data set, in which every error is a `UserError`."""
    download = f"`python -c \"import datasets; datasets.load_dataset('{name}')\"`"
    try:
        with hub_client.reading(f"the data set {name}", download):
            yield
    except UserError:
        raise
    except Exception as error:
        # `datasets` raises a different class for each of a missing name, split, file and network.
        cause = error.__cause__ if type(error) is DatasetGenerationError and error.__cause__ else error
        advice = next((f". {advice}" for words, advice in _ADVICE.items() if words in str(cause)), "")
        if not advice and Path(name or "").is_file():
            advice = ". It is a file: name the directory that contains it"
        raise UserError(
            f"cannot load split {split!r} of data set {name!r}: {type(cause).__name__}: "
            f"{str(cause).rstrip('.!') if advice else cause}{advice}"
        ) from error


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a source, without empty ones.

    Attributes:
        files: for each shard, the position of its file among those of the source, shape [S].
        groups: row group of each shard in its file, 0 in a tar file, shape [S].
        first_rows: first row of each shard in its file, shape [S].
        sizes: samples in each shard, shape [S].
        labels: distinct label values.
        digest: of all labels in order.
    """

    files: np.ndarray
    groups: np.ndarray
    first_rows: np.ndarray
    sizes: np.ndarray
    labels: list[Any]
    digest: str


def load_index(source: ShardSource) -> ShardIndex:
    """The index of a source, cached beside the data sets of `datasets`.

    Indexing parquet files is quick; tar files are read from end to end, once. Of the processes that share a cache and
    call this at the same time, one does the work.
    Raises `UserError` with the name of a file that cannot be read, or of a row without a label.
    """
    content = with_writable_cache(
        lambda cache: _indexed(source, Path(cache or config.HF_DATASETS_CACHE) / "lora_dist_shards")
    )
    by_file = [np.array(sizes, dtype=np.int64) for sizes in content["sizes"]]
    files = np.repeat(np.arange(len(by_file)), [len(sizes) for sizes in by_file])
    groups = np.concatenate([np.arange(len(sizes)) for sizes in by_file])
    first_rows = np.concatenate([np.cumsum(sizes) - sizes for sizes in by_file])
    sizes = np.concatenate(by_file)
    full = sizes > 0
    return ShardIndex(files[full], groups[full], first_rows[full], sizes[full], content["labels"], content["digest"])


def _indexed(source: ShardSource, directory: Path) -> dict[str, Any]:
    """The content of the index in a directory, which is written unless it is there and whole."""
    path = directory / f"{_identity(source)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with waiting.locked(f"{path}.lock", "indexes the shards"):
        content = _read_index(path, source.label_feature)
        if content is None:
            with hub_client.reading("the shards, to be indexed", "leaving out --streaming once"):
                content = _survey_all(source)
            replace_file(path, json.dumps(content).encode())
        return content


def _read_index(path: Path, label_feature: Any) -> dict[str, Any] | None:
    """The content of an index; None if it is missing or damaged, or has rows without a label, as older ones can."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        is_whole = {"sizes", "labels", "digest"} <= content.keys()
        return content if is_whole and all(has_label(label, label_feature) for label in content["labels"]) else None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError):
        logger.warning("%s is damaged; rewriting it", path)
        return None


def _identity(source: ShardSource) -> str:
    """Digest of all that the index depends on. A URL of the Hub contains the commit."""
    digest = hashlib.sha256(repr((source.format, source.label_column)).encode())
    for file in source.files:
        found = Path(file).stat() if Path(file).is_file() else None
        digest.update(repr((file, found and (found.st_size, found.st_mtime_ns))).encode())
    return digest.hexdigest()[:32]


def _survey_all(source: ShardSource) -> dict[str, Any]:
    count = len(source.files)
    interval = 0.5 if sys.stderr.isatty() else 60
    with ThreadPoolExecutor(THREADS) as pool:
        surveys = pool.map(lambda file: _survey(source, file), range(count))
        found = list(
            tqdm(surveys, "indexing shards", count, unit="file", delay=5, mininterval=interval, file=sys.stderr)
        )
    labels = set().union(*(labels for _, labels, _ in found))
    return {
        "sizes": [sizes for sizes, _, _ in found],
        "labels": sorted(labels, key=lambda label: (isinstance(label, str), label)),
        "digest": hashlib.sha256("".join(digest for _, _, digest in found).encode()).hexdigest()[:16],
    }


def _survey(source: ShardSource, file: int) -> tuple[list[int], set[Any], str]:
    """Samples in each shard of a file, its distinct labels, and the digest of all its labels."""
    name = os.path.basename(source.files[file])
    try:
        sizes, labels = source.survey(file)
    except UserError:
        raise
    except Exception as error:
        # Decoders and networks raise errors of many classes.
        raise UserError(f"cannot read {source.files[file]}: {type(error).__name__}: {error}") from error
    if source.label_column is None:
        return sizes, set(), hashlib.sha256(repr(sizes).encode()).hexdigest()
    require_labels(labels, source.label_feature, source.label_column, name)
    return sizes, set(labels), hashlib.sha256("\0".join(map(str, labels)).encode()).hexdigest()
