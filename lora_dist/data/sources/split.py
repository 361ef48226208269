"""One split of a data set: images with labels, and a fingerprint of both."""

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from lora_dist.data.pixels.images import from_cell, load_rgb
from lora_dist.data.sampling.order import SampleOrder, ShuffledOrder
from lora_dist.data.sampling.protocol import EncodedSample, Reader
from lora_dist.data.sources.columns import (
    files_of,
    holds_files,
)

BEGINNING = 2**20
"""Bytes of a file that its split is recognized by."""


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
        table: a `datasets` table of the image column alone, left undecoded.
        column: name of that column.
        rows: row of the table for each sample, shape [N].
        labels: class of each sample as a place in the label map, shape [N].
    """

    table: Dataset
    column: str
    rows: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Any:
        """Sample `index` as an upright RGB image; raises `UnreadableImageError` with its name."""
        return load_rgb(*self._source(index))

    def name(self, index: int) -> str:
        return self._source(index)[1]

    def read(self, epoch: int, rows: Sequence[int]) -> Mapping[int, EncodedSample]:
        cells = self.table[self.rows[list(rows)].tolist()][self.column]
        cell_of = dict(zip(rows, cells, strict=True))
        return {row: EncodedSample(*self._named(row, cell), int(self.labels[row])) for row, cell in cell_of.items()}

    def reader(self) -> Reader:
        return self

    def sample_order(self, seed: int) -> SampleOrder:
        return ShuffledOrder(len(self), seed)

    def describe(self) -> dict[str, Any]:
        return {"num_samples": len(self), "fingerprint": self.fingerprint(), "rows": self.rows.tolist()}

    def _source(self, index: int) -> tuple[Any, str]:
        return self._named(index, self.table[int(self.rows[index])][self.column])

    def _named(self, index: int, cell: Any) -> tuple[Any, str]:
        source, name = from_cell(cell)
        return source, name or f"row {self.rows[index]}"

    def select(self, indices: np.ndarray) -> "Split":
        """The samples at `places`, in that order."""
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])

    def fingerprint(self) -> str:
        """Digest of what the data was when this was first asked for: rows, labels and sizes of all samples, names and
        beginnings of some. Times do not count: they differ between copies on several machines."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for numbers in (self.rows, self.labels, self._sizes()):
            digest.update(numbers.astype(np.int64).tobytes())
        for cell in self.table.select(self.rows[:: max(1, len(self) // 64)])[self.column]:
            source, name = from_cell(cell)
            digest.update(os.path.basename(name).encode())
            digest.update(source[:BEGINNING] if isinstance(source, bytes) else _beginning(source))
        return digest.hexdigest()[:16]

    def _sizes(self) -> np.ndarray:
        """Bytes of each sample's file, shape [N], 0 for what is none; those in the table are counted, and not read."""
        if not holds_files(self.table, self.column):
            return np.zeros(len(self))
        sizes = [_size(path) if length is None else length for path, length in files_of(self.table, self.column)]
        return np.array(sizes)[self.rows]


def _size(path: str | None) -> int:
    try:
        status = os.stat(path or "")  # noqa: PTH116
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _beginning(source: Any) -> bytes:
    """Of a file; nothing of what is none or cannot be read, of which training tells."""
    if not isinstance(source, str) or not _size(source):
        return b""
    try:
        with Path(source).open("rb") as file:
            return file.read(BEGINNING)
    except OSError:
        return b""


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places to keep and places to hold out, both ascending: `fraction` of each class, at least one of two.

    Args:
        labels: class of each sample, shape [N].
        fraction: share to hold out.
        seed: decides which; the same on every process.
    """
    held_out = []
    for label in np.unique(labels):
        indices = np.flatnonzero(labels == label)
        count = min(max(round(fraction * len(indices)), 1), len(indices) - 1)
        held_out.append(np.random.default_rng([seed, int(label)]).permutation(indices)[:count])
    chosen = np.sort(np.concatenate(held_out)) if held_out else np.array([], dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen
