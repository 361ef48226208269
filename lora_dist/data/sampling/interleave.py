"""The order of data that is read forward only: shards dealt to lanes, lanes to processes and their workers.

Each epoch, the shards are permuted and dealt to a fixed number of lanes of about the same length. A lane is its shards
one after another, cut into blocks, and each block is permuted. The order of the epoch goes round the lanes, one sample
of each, as long as they last. So a reader holds one block of each of its lanes and reads on from there, and yet the
order is a pure function of the sizes of the shards, the seed and the epoch, whatever the processes and workers.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lora_dist.data.sampling.order import PADDING_INDEX, Sample


class Piece(NamedTuple):
    """Part of a shard that belongs to a block.

    Attributes:
        shard: index of the shard.
        start: its first row in the shard.
        stop: the row after its last.
    """

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """How the shards of one epoch lie in lanes; lanes are numbered from the longest to the shortest.

    A sample stands at `index` in its lane. `flat` counts through the lanes one after another, shard by shard.

    Attributes:
        lengths: samples in each lane, descending, shape [L].
        offsets: where each lane begins, flat, shape [L + 1].
        shards: shards in the order in which they lie in the lanes, shape [S].
        starts: where each of these begins, flat, shape [S], ascending.
        indices: position of each shard in `shards`, shape [S]; of no meaning for empty ones.
        first_rows: first row of each shard in the data set, shape [S].
        block: samples in a block, even.
        seed: of the permutations within blocks, the epoch included.
    """

    lengths: np.ndarray
    offsets: np.ndarray
    shards: np.ndarray
    starts: np.ndarray
    indices: np.ndarray
    first_rows: np.ndarray
    block: int
    seed: tuple[int, ...]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lane of each position of the epoch, and index in it."""
        ends = np.unique(self.lengths)
        begins = np.concatenate([[0], ends[:-1]])
        lanes = np.searchsorted(-self.lengths, -begins, side="left")
        first_positions = np.concatenate([[0], np.cumsum((ends - begins) * lanes)[:-1]])
        stretch = np.searchsorted(first_positions, positions, side="right") - 1
        rounds, lane = np.divmod(positions - first_positions[stretch], lanes[stretch])
        return lane, begins[stretch] + rounds

    def blocks(self, lane: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Block of each index in its lane. Lanes change blocks at different times, so that reading is spread."""
        return (index + self._phase(lane)) // self.block

    def _phase(self, lane: np.ndarray) -> np.ndarray:
        return lane * self.block // len(self.lengths) // 2 * 2

    def bounds(self, lane: int, block: int) -> tuple[int, int]:
        """First index of a block in its lane, and the index after its last."""
        start = block * self.block - int(self._phase(np.array(lane)))
        return max(start, 0), min(start + self.block, int(self.lengths[lane]))

    def rows(self, lane: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row of the data set at each index of a lane, and that of the neighbour it is mixed with."""
        own, neighbour = np.empty_like(index), np.empty_like(index)
        blocks = (lane << 32) + self.blocks(lane, index)
        by_block = np.argsort(blocks, kind="stable")
        keys, firsts = np.unique(blocks[by_block], return_index=True)
        ends = [*firsts[1:], len(index)]
        for key, first, end in zip(keys.tolist(), firsts, ends, strict=False):
            group = by_block[first:end]
            in_lane, block = divmod(key, 1 << 32)
            start, stop = self.bounds(in_lane, block)
            permutation = np.random.default_rng([*self.seed, in_lane, block]).permutation(stop - start)
            within = index[group] - start
            beside = within ^ 1
            beside = np.where(beside < stop - start, beside, np.maximum(within - 1, 0))
            own[group] = start + permutation[within]
            neighbour[group] = start + permutation[beside]
        return self._row(lane, own), self._row(lane, neighbour)

    def _row(self, lane: np.ndarray, unpermuted: np.ndarray) -> np.ndarray:
        flat = self.offsets[lane] + unpermuted
        position = np.searchsorted(self.starts, flat, side="right") - 1
        return self.first_rows[self.shards[position]] + flat - self.starts[position]

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lane and block that hold each row."""
        shard = np.searchsorted(self.first_rows, rows, side="right") - 1
        flat = self.starts[self.indices[shard]] + rows - self.first_rows[shard]
        lane = np.searchsorted(self.offsets, flat, side="right") - 1
        return lane, self.blocks(lane, flat - self.offsets[lane])

    def pieces(self, lane: int, start: int) -> Iterator[Piece]:
        """What a lane holds from an index on, unpermuted."""
        flat, end = int(self.offsets[lane]) + start, int(self.offsets[lane + 1])
        position = int(np.searchsorted(self.starts, flat, side="right")) - 1
        while flat < end:
            first = int(self.starts[position])
            stop = int(self.starts[position + 1]) if position + 1 < len(self.starts) else end
            yield Piece(int(self.shards[position]), flat - first, stop - first)
            position, flat = position + 1, stop


class Interleave:
    """The arrangement of a data set of shards.

    Attributes:
        sizes: samples in each shard, shape [S].
        count: number of lanes.
        block: samples of a lane that are shuffled among each other, even.
        seed: decides the order.
    """

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
        """Deals the shards, each to the lane with the fewest samples so far."""
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(np.flatnonzero(self.sizes))
        dealt: list[list[int]] = [[] for _ in range(self.count)]
        lightest = [(0, lane) for lane in range(self.count)]
        for shard, size in zip(shuffled.tolist(), self.sizes[shuffled].tolist(), strict=True):
            total, lane = lightest[0]
            dealt[lane].append(shard)
            heapq.heapreplace(lightest, (total + size, lane))
        totals = np.array([self.sizes[shards].sum() for shards in dealt])
        longest_first = np.argsort(-totals, kind="stable")
        shards = np.concatenate([dealt[lane] for lane in longest_first]).astype(np.int64)
        indices = np.zeros(len(self.sizes), dtype=np.int64)
        indices[shards] = np.arange(len(shards))
        return Layout(
            lengths=totals[longest_first],
            offsets=np.concatenate([[0], np.cumsum(totals[longest_first])]),
            shards=shards,
            starts=np.cumsum(self.sizes[shards]) - self.sizes[shards],
            indices=indices,
            first_rows=np.cumsum(self.sizes) - self.sizes,
            block=self.block,
            seed=(self.seed, epoch),
        )

    def micro_batch_count(self, epoch: int, window: range, batch: int, world_size: int) -> int:
        lane, _ = self.layout(epoch).locate(np.array(window))
        return -(-int(np.bincount(lane % world_size).max()) // batch)

    def micro_batches(
        self, epoch: int, window: range, batch: int, world_size: int, rank: int
    ) -> Iterator[list[Sample]]:
        """Every process has every `world_size`-th lane, so at any time equally many that last, or one fewer.

        Where a process has fewer samples than another, all its micro-batches are smaller.
        """
        layout = self.layout(epoch)
        count = self.micro_batch_count(epoch, window, batch, world_size)
        positions = np.array(window)
        lane, index = layout.locate(positions)
        mine = lane % world_size == rank
        rows, partners = layout.rows(lane[mine], index[mine])
        samples = [
            Sample(epoch, row, position, partner, lane=of_lane // world_size)
            for row, position, partner, of_lane in zip(
                rows.tolist(), positions[mine].tolist(), partners.tolist(), lane[mine].tolist(), strict=True
            )
        ]
        padding = Sample(epoch, PADDING_INDEX, window.start, PADDING_INDEX, weight=0.0, lane=0)
        for part in np.array_split(np.arange(len(samples)), count):
            yield [samples[position] for position in part] or [padding]
