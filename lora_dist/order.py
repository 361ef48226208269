"""Which samples each process sees in each update: a pure function of (seed, epoch, row), whatever the world size.

An epoch is one permutation of all samples. Update `u` of an epoch takes the next `effective_batch` of them, the
last one what is left. A window of an update is cut into micro-batches over all processes at once, and each
micro-batch into one share for each process, so every way of splitting the same effective batch trains on the
same samples in the same update.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Sample(NamedTuple):
    """One sample of one epoch.

    Attributes:
        epoch: from 0.
        row: in the data set.
        position: place in the epoch's order; samples are mixed (mixup, cutmix) in pairs of neighbours.
        partner: row of the neighbour.
        weight: 1, or 0 for a filler on a process that would otherwise have nothing to do.
    """

    epoch: int
    row: int
    position: int
    partner: int
    weight: float = 1.0


@dataclass(frozen=True)
class Order:
    """The order of a run.

    Attributes:
        num_samples: rows of the training set.
        per_device_batch: samples in a micro-batch of one process.
        accumulation: micro-batches in an update.
        world_size: number of processes.
        rank: this process.
        seed: of the permutations.
    """

    num_samples: int
    per_device_batch: int
    accumulation: int
    world_size: int
    rank: int
    seed: int

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
        start = step % self.steps_per_epoch * self.effective_batch
        return min(self.effective_batch, self.num_samples - start)

    def samples_before(self, step: int) -> int:
        """Samples in all updates before `step`, over all processes."""
        epochs, within = divmod(step, self.steps_per_epoch)
        return epochs * self.num_samples + min(within * self.effective_batch, self.num_samples)

    def micro_batches_in(self, step: int) -> int:
        """Micro-batches in update `step`, the same number on every process."""
        return -(-self.samples_in(step) // (self.per_device_batch * self.world_size))

    def micro_batches(self, step: int) -> Iterator[list[Sample]]:
        """This process's share of each micro-batch of update `step`; never empty."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.effective_batch
        window = np.arange(start, start + self.samples_in(step))
        together = self.per_device_batch * self.world_size
        for first in range(0, len(window), together):
            share = np.array_split(window[first : first + together], self.world_size)[self.rank]
            if len(share):
                yield [self._sample(epoch, int(position)) for position in share]
            else:
                yield [self._sample(epoch, int(window[first]))._replace(weight=0.0)]

    def _sample(self, epoch: int, position: int) -> Sample:
        permutation = _permutation(self.seed, epoch, self.num_samples)
        neighbour = position ^ 1
        if neighbour >= self.num_samples:
            neighbour = max(position - 1, 0)
        return Sample(epoch, int(permutation[position]), position, int(permutation[neighbour]))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


class MicroBatches(Sampler[list[Sample]]):
    """All micro-batches of this process from update `first_step` on, for a `DataLoader`'s `batch_sampler`."""

    def __init__(self, order: Order, first_step: int, last_step: int) -> None:
        self.order = order
        self.steps = range(first_step, last_step)

    def __iter__(self) -> Iterator[list[Sample]]:
        for step in self.steps:
            yield from self.order.micro_batches(step)

    def __len__(self) -> int:
        return sum(self.order.micro_batches_in(step) for step in self.steps)


FILLER = -1
"""Stands in an evaluation batch for a row that this process only sees to keep step with the others."""


def evaluation_batches(num_samples: int, batch: int, world_size: int, rank: int) -> list[list[int]]:
    """Rows of each evaluation batch of this process; every row stands on one process, once.

    All processes get equally many batches, as the collectives of a sharded model need: a process that runs out
    gets `[FILLER]`.
    """
    share = np.array_split(np.arange(num_samples), world_size)
    count = -(-max(len(rows) for rows in share) // batch)
    mine = share[rank].tolist()
    return [mine[start : start + batch] or [FILLER] for start in range(0, count * batch, batch)]
