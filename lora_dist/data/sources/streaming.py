"""Streamed training data: shards as a split that is read forward only, one block of each lane at a time."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_dist import waiting
from lora_dist.data.pixels.images import UnreadableImageError, from_cell
from lora_dist.data.sampling.interleave import Interleave, Layout, Piece
from lora_dist.data.sampling.order import SampleOrder
from lora_dist.data.sampling.training_split import EncodedSample, Reader
from lora_dist.data.sources.class_names import require_distinct, warn_of_similar
from lora_dist.data.sources.columns import class_names
from lora_dist.data.sources.load import ImageData, check_classes, load_test, load_validation
from lora_dist.data.sources.shards import Row, ShardIndex, ShardSource, find_source, load_index
from lora_dist.errors import UserError
from lora_dist.settings.train import DataSettings

MAX_LANES = 64


@dataclass(frozen=True)
class StreamedSplit:
    """The rows of all shards, one shard after another; `class_of` maps each label value to its class index."""

    source: ShardSource
    index: ShardIndex
    class_of: Mapping[Any, int]
    lanes: Interleave

    def __len__(self) -> int:
        return self.lanes.num_samples

    @property
    def label_shape(self) -> tuple[int, ...]:
        return ()

    def name(self, index: int) -> str:
        shard = int(np.searchsorted(np.cumsum(self.index.sizes), index, side="right"))
        return self.name_in(shard, index - int(self.index.sizes[:shard].sum()))

    def name_in(self, shard: int, row: int) -> str:
        """Name of a row of a shard: the file, and the row in it."""
        file = os.path.basename(self.source.files[self.index.files[shard]])
        return f"{file} row {self.index.first_rows[shard] + row}"

    def fingerprint(self) -> str:
        names = "".join(os.path.basename(file) for file in self.source.files)
        content = self.index.digest.encode() + self.index.sizes.tobytes() + names.encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        counts = np.bincount(self.index.files, self.index.sizes, len(self.source.files)).astype(int).tolist()
        return {
            "num_samples": len(self),
            "fingerprint": self.fingerprint(),
            "files": dict(zip(self.source.files, counts, strict=True)),
        }

    def sample_order(self, seed: int) -> SampleOrder:
        assert seed == self.lanes.seed
        return self.lanes

    def reader(self) -> Reader:
        return LaneReader(self)


class LaneReader:
    """Holds one block of each lane that it reads, undecoded, and continues from there."""

    def __init__(self, split: StreamedSplit) -> None:
        self._split = split
        self._blocks: dict[int, _Block] = {}
        self._at = ""

    @property
    def held(self) -> int:
        """Samples in memory."""
        return sum(len(block.samples) for block in self._blocks.values())

    def read(self, epoch: int, indices: Sequence[int]) -> Mapping[int, EncodedSample]:
        lanes, blocks = self._split.lanes.layout(epoch).find(np.array(indices, dtype=np.int64))
        return {
            index: self._block(epoch, lane, number).samples[index]
            for index, lane, number in zip(indices, lanes.tolist(), blocks.tolist(), strict=True)
        }

    def _block(self, epoch: int, lane: int, number: int) -> "_Block":
        held = self._blocks.get(lane)
        if held is None or (held.epoch, held.number) != (epoch, number):
            layout = self._split.lanes.layout(epoch)
            start, stop = layout.bounds(lane, number)
            if held is not None and (held.epoch, held.number) == (epoch, number - 1):
                following = held.following
            else:
                following = self._samples(layout, layout.pieces(lane, start))
            self._blocks.pop(lane, None)
            # `datasets` retries the Hub for up to half an hour (STREAMING_READ_MAX_RETRIES).
            with waiting.log_wait(lambda: f"waiting for {self._at}"):
                samples = dict(next(following) for _ in range(stop - start))
            self._blocks[lane] = _Block(epoch, number, samples, following)
        return self._blocks[lane]

    def _samples(self, layout: Layout, pieces: Iterator[Piece]) -> Iterator[tuple[int, EncodedSample]]:
        split, index = self._split, self._split.index
        for shard, start, stop in pieces:
            position, self._at, first = start, split.name_in(shard, start), int(layout.first_indices[shard])
            try:
                rows = split.source.read(int(index.files[shard]), int(index.groups[shard]), start)
                for position in range(start, stop):
                    row = next(rows, None)
                    if row is None:
                        raise EOFError("the file has changed since it was indexed")
                    yield first + position, self._encoded(row, split.name_in(shard, position))
            except Exception as error:
                # Decoders and networks raise errors of many classes.
                name = split.name_in(shard, position)
                raise UnreadableImageError(f"{name}: {type(error).__name__}: {error}") from error

    def _encoded(self, row: Row, name: str) -> EncodedSample:
        source, inner = from_cell(row.cell)
        return EncodedSample(source, f"{name} ({inner})" if inner else name, self._split.class_of[row.label])


@dataclass(frozen=True)
class _Block:
    """One block of a lane, and an iterator over the samples that follow it in the lane."""

    epoch: int
    number: int
    samples: dict[int, EncodedSample]
    following: Iterator[tuple[int, EncodedSample]]


def prepare(settings: DataSettings) -> None:
    """Indexes the shards unless the index is cached. This can take longer than processes wait for each other."""
    load_index(find_source(settings))


def load_streamed(settings: DataSettings, seed: int, processes: int) -> ImageData:
    """Finds the training shards, and loads the validation split.

    Raises `UserError` as `load_data`, and if there are too few shards for `processes`.
    """
    source = find_source(settings)
    index = load_index(source)
    lanes = _lanes(settings, index, seed, processes)
    names = class_names(source.label_feature, set(index.labels))
    labels = list(names.values())
    require_distinct(labels)
    warn_of_similar(labels)
    validation = load_validation(settings, seed, labels)
    class_of = {value: label for label, value in enumerate(names)}
    check_classes(settings, labels, {class_of[label] for label in index.labels}, validation)
    train = StreamedSplit(source, index, class_of, lanes)
    return ImageData(labels, train, validation, load_test(settings, labels))


def _lanes(settings: DataSettings, index: ShardIndex, seed: int, processes: int) -> Interleave:
    """By default the largest power of two that is at most min(64, shards), as the number of processes often is one."""
    shards = len(index.sizes)
    if not shards:
        raise UserError(f"0 training images: {settings.dataset_name} has no rows in split {settings.train_split}")
    count = settings.streaming_lanes or 2 ** (min(shards, MAX_LANES).bit_length() - 1)
    if count > shards:
        raise UserError(f"--streaming_lanes {count}: the data set has {shards} shards (row groups or tar files)")
    if count < processes:
        more = f"set --streaming_lanes to between {processes} and {shards}, " if shards >= processes else ""
        raise UserError(
            f"{shards} shards (row groups or tar files) in {count} lanes cannot be shared by {processes} processes: "
            f"{more}start fewer processes, or write the data set in more shards"
        )
    block = max(2, settings.shuffle_buffer_size // count // 2 * 2)
    return Interleave(index.sizes, count, block, seed)
