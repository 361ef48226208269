"""Which samples each process sees in each update: a pure function of (seed, epoch, row), whatever the world size.

An epoch is an arrangement of all samples, each once. Update `u` of an epoch takes the next `effective_batch` of them,
the last one what is left. So every way of splitting the same effective batch trains on the same samples in the same
update. How a window of an update is dealt to the processes, and cut into micro-batches, is up to the arrangement.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from torch.utils.data import Sampler

PADDING_INDEX = -1
"""Stands in a batch for a row that this process only sees to keep step with the others."""


class Sample(NamedTuple):
    """One sample of one epoch.

    Attributes:
        epoch: from 0.
        row: in the data set, or `PADDING_INDEX`.
        position: place in the epoch's order; samples are mixed (mixup, cutmix) in pairs of neighbours.
        partner: row of the neighbour.
        weight: 1, or 0 for a filler on a process that would otherwise have nothing to do.
        lane: decides which worker process reads it; None where any may.
    """

    epoch: int
    row: int
    position: int
    partner: int
    weight: float = 1.0
    lane: int | None = None


class SampleOrder(Protocol):
    """The order of an epoch's samples, and how a window of it is dealt to processes."""

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        ...

    @property
    def description(self) -> str:
        """What, besides the data and the seed, decides the order."""
        ...

    def micro_batch_count(self, epoch: int, window: range, batch: int, world_size: int) -> int:
        """Micro-batches of at most `batch` samples a process that the positions in `window` make on each process."""
        ...

    def micro_batches(
        self, epoch: int, window: range, batch: int, world_size: int, rank: int
    ) -> Iterator[list[Sample]]:
        """The share of process `rank` in each of them; never empty."""
        ...


@dataclass(frozen=True)
class ShuffledOrder:
    """One permutation of all rows an epoch, where any process can read any row.

    Attributes:
        num_samples: rows of the data set.
        seed: of the permutations.
    """

    num_samples: int
    seed: int
    description = "shuffled"

    def micro_batch_count(self, epoch: int, window: range, batch: int, world_size: int) -> int:
        return -(-len(window) // (batch * world_size))

    def micro_batches(
        self, epoch: int, window: range, batch: int, world_size: int, rank: int
    ) -> Iterator[list[Sample]]:
        positions = np.array(window)
        together = batch * world_size
        for first in range(0, len(positions), together):
            share = np.array_split(positions[first : first + together], world_size)[rank]
            if len(share):
                yield [self._sample(epoch, int(position)) for position in share]
            else:
                yield [self._sample(epoch, int(positions[first]))._replace(weight=0.0)]

    def _sample(self, epoch: int, position: int) -> Sample:
        permutation = _permutation(self.seed, epoch, self.num_samples)
        neighbour = position ^ 1
        if neighbour >= self.num_samples:
            neighbour = max(position - 1, 0)
        return Sample(epoch, int(permutation[position]), position, int(permutation[neighbour]))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


@dataclass(frozen=True)
class BatchPlan:
    """The order of a run.

    Attributes:
        sample_order: of the samples of each epoch.
        per_device_batch: most samples in a micro-batch of one process.
        accumulation: micro-batches in an update.
        world_size: number of processes.
        rank: this process.
    """

    sample_order: SampleOrder
    per_device_batch: int
    accumulation: int
    world_size: int
    rank: int

    @property
    def num_samples(self) -> int:
        """Samples in an epoch, over all processes."""
        return self.sample_order.num_samples

    @property
    def effective_batch(self) -> int:
        """Samples in an update, over all processes."""
        return self.per_device_batch * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Updates in an epoch; a last, smaller one counts."""
        return -(-self.num_samples // self.effective_batch)

    def samples_in(self, step: int) -> int:
        """Samples in update `step` (from 0), over all processes."""
        return len(self._window(step))

    def samples_before(self, step: int) -> int:
        """Samples in all updates before `step`, over all processes."""
        epochs, within = divmod(step, self.steps_per_epoch)
        return epochs * self.num_samples + min(within * self.effective_batch, self.num_samples)

    def micro_batches_in(self, step: int) -> int:
        """Micro-batches in update `step`, the same number on every process."""
        epoch = step // self.steps_per_epoch
        return self.sample_order.micro_batch_count(epoch, self._window(step), self.per_device_batch, self.world_size)

    def micro_batches(self, step: int) -> Iterator[list[Sample]]:
        """This process's share of each micro-batch of update `step`; never empty."""
        epoch = step // self.steps_per_epoch
        return self.sample_order.micro_batches(
            epoch, self._window(step), self.per_device_batch, self.world_size, self.rank
        )

    def _window(self, step: int) -> range:
        """Positions of update `step` in its epoch."""
        start = step % self.steps_per_epoch * self.effective_batch
        return range(start, min(start + self.effective_batch, self.num_samples))


class MicroBatches(Sampler[list[Sample]]):
    """All micro-batches of this process from update `first_step` on, for a `DataLoader`'s `batch_sampler`."""

    def __init__(self, order: BatchPlan, first_step: int, last_step: int) -> None:
        self.order = order
        self.steps = range(first_step, last_step)

    def __iter__(self) -> Iterator[list[Sample]]:
        for step in self.steps:
            yield from self.order.micro_batches(step)

    def __len__(self) -> int:
        return sum(self.order.micro_batches_in(step) for step in self.steps)


def evaluation_batches(num_samples: int, batch: int, world_size: int, rank: int) -> list[list[int]]:
    """Rows of each evaluation batch of this process; every row stands on one process, once.

    All processes get equally many batches, as the collectives of a sharded model need: a process that runs out
    gets `[PADDING_INDEX]`.
    """
    share = np.array_split(np.arange(num_samples), world_size)
    count = -(-max(len(rows) for rows in share) // batch)
    mine = share[rank].tolist()
    return [mine[start : start + batch] or [PADDING_INDEX] for start in range(0, count * batch, batch)]
