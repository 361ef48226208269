"""The order of streamed data: shards are interleaved in lanes, and lanes are assigned to processes and their workers.

Each epoch permutes the shards and distributes them over a fixed number of lanes of about the same length. A lane
concatenates its shards and shuffles them in blocks, like a shuffle buffer. The epoch cycles through the lanes and takes
one sample of each, like `tf.data`'s `interleave`, until all lanes are exhausted. A reader holds one block of each of
its lanes and reads forward only. The order is a pure function of the sizes of the shards, the seed and the epoch, for
any number of processes and workers.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lora_dist.data.sampling.order import PADDING_INDEX, Sample


class Piece(NamedTuple):
    """Rows `start` to `stop` (excluded) of a shard."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """The lanes of one epoch, numbered from the longest to the shortest.

    `offset` is the position of a sample in its lane before shuffling. A flat position counts through all lanes, shard
    by shard.

    Attributes:
        lengths: number of samples in each lane, longest lane first, shape [L].
        lane_starts: flat position of each lane, and of the end, shape [L + 1].
        shards: shards in flat order, shape [S].
        shard_starts: flat position of each of `shards`, ascending, shape [S].
        flat_starts: flat position of shard 0, 1, …; undefined for empty shards.
        first_indices: index in the split of the first sample of shard 0, 1, …
        block: samples in a block, even.
        seed: of the permutations within blocks, the epoch included.
    """

    lengths: np.ndarray
    lane_starts: np.ndarray
    shards: np.ndarray
    shard_starts: np.ndarray
    flat_starts: np.ndarray
    first_indices: np.ndarray
    block: int
    seed: tuple[int, ...]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lane and offset of each position of the epoch."""
        ends = np.unique(self.lengths)
        begins = np.concatenate([[0], ends[:-1]])
        lanes = np.searchsorted(-self.lengths, -begins, side="left")
        first_positions = np.concatenate([[0], np.cumsum((ends - begins) * lanes)[:-1]])
        stretch = np.searchsorted(first_positions, positions, side="right") - 1
        rounds, lane = np.divmod(positions - first_positions[stretch], lanes[stretch])
        return lane, begins[stretch] + rounds

    def blocks(self, lane: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Block of each offset. Lanes change blocks at different times, which spreads the reading."""
        return (offset + self._phase(lane)) // self.block

    def _phase(self, lane: np.ndarray) -> np.ndarray:
        return lane * self.block // len(self.lengths) // 2 * 2

    def bounds(self, lane: int, block: int) -> tuple[int, int]:
        """First offset of a block, and the offset after its last."""
        start = block * self.block - int(self._phase(np.array(lane)))
        return max(start, 0), min(start + self.block, int(self.lengths[lane]))

    def indices(self, lane: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index in the split of the shuffled sample at each offset, and of the partner that it is mixed with."""
        own, partner = np.empty_like(offset), np.empty_like(offset)
        blocks = (lane << 32) + self.blocks(lane, offset)
        by_block = np.argsort(blocks, kind="stable")
        keys, firsts = np.unique(blocks[by_block], return_index=True)
        for key, group in zip(keys.tolist(), np.split(by_block, firsts[1:]), strict=False):
            in_lane, block = divmod(key, 1 << 32)
            start, stop = self.bounds(in_lane, block)
            permutation = np.random.default_rng([*self.seed, in_lane, block]).permutation(stop - start)
            within = offset[group] - start
            beside = within ^ 1
            beside = np.where(beside < stop - start, beside, np.maximum(within - 1, 0))
            own[group] = start + permutation[within]
            partner[group] = start + permutation[beside]
        return self._index(lane, own), self._index(lane, partner)

    def _index(self, lane: np.ndarray, offset: np.ndarray) -> np.ndarray:
        flat = self.lane_starts[lane] + offset
        slot = np.searchsorted(self.shard_starts, flat, side="right") - 1
        return self.first_indices[self.shards[slot]] + flat - self.shard_starts[slot]

    def find(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lane and block of each index in the split."""
        shard = np.searchsorted(self.first_indices, indices, side="right") - 1
        flat = self.flat_starts[shard] + indices - self.first_indices[shard]
        lane = np.searchsorted(self.lane_starts, flat, side="right") - 1
        return lane, self.blocks(lane, flat - self.lane_starts[lane])

    def pieces(self, lane: int, offset: int) -> Iterator[Piece]:
        """The shards of a lane from an offset on, before shuffling."""
        flat, end = int(self.lane_starts[lane]) + offset, int(self.lane_starts[lane + 1])
        slot = int(np.searchsorted(self.shard_starts, flat, side="right")) - 1
        while flat < end:
            first = int(self.shard_starts[slot])
            stop = int(self.shard_starts[slot + 1]) if slot + 1 < len(self.shards) else end
            yield Piece(int(self.shards[slot]), flat - first, stop - first)
            slot, flat = slot + 1, stop


class Interleave:
    """The `SampleOrder` of shards with `sizes` samples in `count` lanes; each lane is shuffled in blocks of `block`."""

    def __init__(self, sizes: np.ndarray, count: int, block: int, seed: int) -> None:
        assert block >= 2
        assert block % 2 == 0
        assert 1 <= count <= np.count_nonzero(sizes)
        self.sizes = sizes
        self.count = count
        self.block = block
        self.seed = seed
        self.layout = lru_cache(maxsize=3)(self._layout)

    @property
    def num_samples(self) -> int:
        return int(self.sizes.sum())

    @property
    def description(self) -> str:
        return f"{self.count} lanes shuffled in blocks of {self.block}"

    def _layout(self, epoch: int) -> Layout:
        """Assigns each shard to the lane with the fewest samples so far."""
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(np.flatnonzero(self.sizes))
        assigned: list[list[int]] = [[] for _ in range(self.count)]
        lightest = [(0, lane) for lane in range(self.count)]
        for shard, size in zip(shuffled.tolist(), self.sizes[shuffled].tolist(), strict=True):
            total, lane = lightest[0]
            assigned[lane].append(shard)
            heapq.heapreplace(lightest, (total + size, lane))
        totals = np.array([self.sizes[shards].sum() for shards in assigned])
        longest_first = np.argsort(-totals, kind="stable")
        shards = np.concatenate([assigned[lane] for lane in longest_first]).astype(np.int64)
        flat_starts = np.zeros(len(self.sizes), dtype=np.int64)
        flat_starts[shards] = np.cumsum(self.sizes[shards]) - self.sizes[shards]
        return Layout(
            lengths=totals[longest_first],
            lane_starts=np.concatenate([[0], np.cumsum(totals[longest_first])]),
            shards=shards,
            shard_starts=flat_starts[shards],
            flat_starts=flat_starts,
            first_indices=np.cumsum(self.sizes) - self.sizes,
            block=self.block,
            seed=(self.seed, epoch),
        )

    def micro_batch_count(self, epoch: int, window: range, batch: int, world_size: int) -> int:
        lane, _ = self.layout(epoch).locate(np.array(window))
        return -(-int(np.bincount(lane % world_size).max()) // batch)

    def micro_batches(
        self, epoch: int, window: range, batch: int, world_size: int, rank: int
    ) -> Iterator[list[Sample]]:
        """Each process reads every `world_size`-th lane, so the lanes that last longest are spread over processes.

        Where a process has fewer samples than another, all its micro-batches are smaller.
        """
        layout, positions = self.layout(epoch), np.array(window)
        lane, offset = layout.locate(positions)
        mine = lane % world_size == rank
        indices, partners = layout.indices(lane[mine], offset[mine])
        columns = (indices, positions[mine], partners, lane[mine] // world_size)
        samples = [
            Sample(epoch, index, position, partner, lane=of_lane)
            for index, position, partner, of_lane in zip(*(column.tolist() for column in columns), strict=True)
        ]
        padding = Sample(epoch, PADDING_INDEX, window.start, PADDING_INDEX, weight=0.0, lane=0)
        for part in np.array_split(np.arange(len(samples)), self.micro_batch_count(epoch, window, batch, world_size)):
            yield [samples[number] for number in part] or [padding]
