"""One split of a data set: images with labels, and a fingerprint of both."""

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from lora_dist.data.pixels.conversion import AS_TRANSFORMERS, Conversion
from lora_dist.data.pixels.images import RANGE_IMAGES, find_pixel_range, from_cell, load_rgb
from lora_dist.data.sampling.order import SampleOrder, ShuffledOrder
from lora_dist.data.sampling.training_split import EncodedSample, Reader
from lora_dist.data.sources.columns import files_of, holds_files
from lora_dist.data.sources.iterative_stratification import stratified_halves, stratified_selection

HEAD_BYTES = 2**20
"""Bytes at the start of a file that count for the fingerprint."""


@dataclass(frozen=True)
class Split:
    """Images with their labels; an index counts the samples, a row counts the table.

    Attributes:
        table: a `datasets` table of the image column alone, undecoded.
        column: name of that column.
        table_rows: row of each sample in the table, shape [N].
        labels: class of each sample as an index of the label map, shape [N]; or 0 and 1 for each of several labels,
            shape [N, labels].
        groups: name of the group of each sample, shape [N]; None if groups are not known.
        slices: value of each sample, shape [N], by column of --slice_columns.
    """

    table: Dataset
    column: str
    table_rows: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = field(default=None, kw_only=True)
    slices: Mapping[str, np.ndarray] = field(default_factory=dict, kw_only=True)

    def __len__(self) -> int:
        return len(self.table_rows)

    def image(self, index: int, conversion: Conversion = AS_TRANSFORMERS) -> Any:
        """Sample `index` as an upright RGB image; raises `UnreadableImageError` with its name."""
        sample = self.read(0, [index])[index]
        return load_rgb(sample.source, sample.name, conversion)

    def pixel_range(self, conversion: Conversion) -> tuple[float, float] | None:
        """`find_pixel_range` of evenly spaced samples; the same on every process."""
        samples = self.read(0, range(len(self))[:: -(-len(self) // RANGE_IMAGES)])
        return find_pixel_range(((sample.source, sample.name) for sample in samples.values()), conversion)

    def name(self, index: int) -> str:
        return self.read(0, [index])[index].name

    def names(self) -> list[str]:
        """The path of each sample's file; the number of its row for images inside a table, of which none is
        read. `lora_dist.predict` writes the same names, so that predictions can be compared."""
        if not holds_files(self.table, self.column):
            return [f"row {row}" for row in self.table_rows]
        files = list(files_of(self.table, self.column))
        return [
            path if path and length is None else f"row {row}{f' ({path})' if path else ''}"
            for row, (path, length) in ((row, files[row]) for row in self.table_rows.tolist())
        ]

    def read(self, epoch: int, indices: Sequence[int]) -> Mapping[int, EncodedSample]:
        table_rows = self.table_rows[list(indices)].tolist()
        found = {}
        for index, row, cell in zip(indices, table_rows, self.table[table_rows][self.column], strict=True):
            source, name = from_cell(cell)
            found[index] = EncodedSample(source, name or f"row {row}", self.labels[index])
        return found

    def reader(self) -> Reader:
        return self

    @property
    def label_shape(self) -> tuple[int, ...]:
        return self.labels.shape[1:]

    def sample_order(self, seed: int) -> SampleOrder:
        return ShuffledOrder(len(self), seed)

    def describe(self) -> dict[str, Any]:
        return {"num_samples": len(self), "fingerprint": self.fingerprint(), "rows": self.table_rows.tolist()}

    def select(self, indices: np.ndarray) -> "Split":
        """The samples at `indices`, in that order."""
        return replace(
            self,
            table_rows=self.table_rows[indices],
            labels=self.labels[indices],
            groups=None if self.groups is None else self.groups[indices],
            slices={name: values[indices] for name, values in self.slices.items()},
        )

    def fingerprint(self) -> str:
        """Digest of the rows, labels and file sizes of all samples, and of the names and first bytes of some, as they
        were at the first call. Times do not count: they differ between copies on several machines."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for numbers in (self.table_rows, self.labels, self._sizes()):
            digest.update(numbers.astype(np.int64).tobytes())
        for cell in self.table.select(self.table_rows[:: max(1, len(self) // 64)])[self.column]:
            source, name = from_cell(cell)
            digest.update(os.path.basename(name).encode())
            digest.update(source[:HEAD_BYTES] if isinstance(source, bytes) else _head(source))
        return digest.hexdigest()[:16]

    def _sizes(self) -> np.ndarray:
        """Encoded bytes of each sample's image, shape [N]; 0 for arrays and missing files. Decodes no image."""
        if not holds_files(self.table, self.column):
            return np.zeros(len(self))
        sizes = [_size(path) if length is None else length for path, length in files_of(self.table, self.column)]
        return np.array(sizes)[self.table_rows]


def _size(path: str | None) -> int:
    try:
        status = os.stat(path or "")  # noqa: PTH116
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _head(source: Any) -> bytes:
    """The first bytes of a file; empty for a file that cannot be read, which training reports."""
    with suppress(OSError):
        if isinstance(source, str) and _size(source):
            with Path(source).open("rb") as file:
                return file.read(HEAD_BYTES)
    return b""


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Holds out `fraction` of each class, and at least one sample of classes with two or more.

    Returns the indices to keep and the indices held out, both ascending. `labels` has the class of each sample, or a
    row of its labels.
    """
    if labels.ndim == 2:
        return stratified_halves(labels, fraction, seed)
    held_out = []
    for label in np.unique(labels):
        indices = np.flatnonzero(labels == label)
        count = min(max(round(fraction * len(indices)), 1), len(indices) - 1)
        held_out.append(np.random.default_rng([seed, int(label)]).permutation(indices)[:count])
    chosen = np.sort(np.concatenate(held_out)) if held_out else np.array([], dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def stratified_sample(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Selects `count` indices, ascending, with a share of each class, and at least one of each while they suffice."""
    if labels.ndim == 2:
        return stratified_selection(labels, count, seed)
    indices, shares, sizes = [], [], []
    for label in np.unique(labels):
        found = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        share = (np.arange(len(found)) + 0.5) / len(found)
        share[0] = -1  # the first of each class comes before all others, that of the largest class first
        indices.append(found)
        shares.append(share)
        sizes.append(np.full(len(found), len(found)))
    order = np.lexsort((-np.concatenate(sizes), np.concatenate(shares)))
    return np.sort(np.concatenate(indices)[order[:count]])
