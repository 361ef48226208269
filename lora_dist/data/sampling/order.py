"""The samples of each process in each update: a pure function of (seed, epoch, position), for any world size.

An epoch visits every sample once. Each update takes the next `effective_batch` samples, the last update of an epoch
takes the rest. Every way of splitting one effective batch therefore trains on the same samples in the same update.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from torch.utils.data import Sampler

PADDING_INDEX = -1
"""Index of a padding sample: a process that has no sample of its own gets one to stay in step with the others."""


class Sample(NamedTuple):
    """One sample of one epoch.

    Attributes:
        epoch: from 0.
        index: in the split, or `PADDING_INDEX`.
        position: in the order of the epoch.
        partner: index of the neighbour in that order, with which mixup and CutMix mix it.
        weight: 1, or 0 where a process has the sample only to stay in step.
        lane: decides which worker process reads the sample; None if any worker may read it.
    """

    epoch: int
    index: int  # type: ignore[assignment]  # hides `tuple.index`
    position: int
    partner: int
    weight: float = 1.0
    lane: int | None = None


class SampleOrder(Protocol):
    """The order of the samples of each epoch, and how a window of it is divided among the processes."""

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""

    @property
    def description(self) -> str:
        """The facts that decide the order besides the data and the seed."""

    def micro_batch_count(self, epoch: int, window: range, batch: int, world_size: int) -> int:
        """Number of micro-batches that each process makes of the positions in `window`, `batch` samples at most."""

    def micro_batches(
        self, epoch: int, window: range, batch: int, world_size: int, rank: int
    ) -> Iterator[list[Sample]]:
        """The samples of process `rank` in each of these micro-batches; never empty."""


@dataclass(frozen=True)
class ShuffledOrder:
    """One permutation of all samples per epoch, for data in which any process can read any sample."""

    num_samples: int
    seed: int
    description = "shuffled"

    def micro_batch_count(self, epoch: int, window: range, batch: int, world_size: int) -> int:
        return -(-len(window) // (batch * world_size))

    def micro_batches(
        self, epoch: int, window: range, batch: int, world_size: int, rank: int
    ) -> Iterator[list[Sample]]:
        for start in range(0, len(window), batch * world_size):
            global_batch = window[start : start + batch * world_size]
            mine = np.array_split(global_batch, world_size)[rank].tolist()
            if mine:
                yield [self._sample(epoch, position) for position in mine]
            else:
                yield [self._sample(epoch, global_batch[0])._replace(weight=0.0)]

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
    """The micro-batches of process `rank` in each update of a run; updates are counted from 0.

    An update has `accumulation` micro-batches of at most `per_device_batch` samples on each process.
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
        """Updates in an epoch, a last, smaller one included."""
        return -(-self.num_samples // self.effective_batch)

    def samples_in(self, step: int) -> int:
        """Samples in update `step`, over all processes."""
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
        """The samples of this process in each micro-batch of update `step`; never empty."""
        epoch, window = step // self.steps_per_epoch, self._window(step)
        return self.sample_order.micro_batches(epoch, window, self.per_device_batch, self.world_size, self.rank)

    def _window(self, step: int) -> range:
        """Positions of update `step` in its epoch."""
        start = step % self.steps_per_epoch * self.effective_batch
        return range(start, min(start + self.effective_batch, self.num_samples))


class MicroBatches(Sampler[list[Sample]]):
    """All micro-batches of updates `first_step` to `last_step` (excluded), for a `DataLoader`'s `batch_sampler`."""

    def __init__(self, plan: BatchPlan, first_step: int, last_step: int) -> None:
        self.plan = plan
        self.steps = range(first_step, last_step)

    def __iter__(self) -> Iterator[list[Sample]]:
        for step in self.steps:
            yield from self.plan.micro_batches(step)

    def __len__(self) -> int:
        return sum(self.plan.micro_batches_in(step) for step in self.steps)


def evaluation_batches(num_samples: int, batch: int, world_size: int, rank: int) -> list[list[int]]:
    """Indices of each evaluation batch of this process; each index is on one process, once.

    All processes get equally many batches, as the collectives of a sharded model need. A process that runs out of
    samples gets `[PADDING_INDEX]`.
    """
    shares = np.array_split(np.arange(num_samples), world_size)
    mine = shares[rank].tolist()
    # The first share is the longest.
    return [mine[start : start + batch] or [PADDING_INDEX] for start in range(0, len(shares[0]), batch)]
