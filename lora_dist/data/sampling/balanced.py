"""An order in which every class comes equally often: a function of seed and epoch, for any number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from lora_dist.data.sampling.order import Sample, ShuffledOrder


@dataclass(frozen=True)
class BalancedOrder:
    """As many samples per epoch as the split has, and the same number of each class.

    The samples of a class come in permutations one after the other, which continue in the next epoch: those of a large
    class take turns, and those of a small class are repeated. Repetition r of sample i in an epoch has index
    i + r * samples, so that each has an augmentation of its own.

    Attributes:
        labels: class of each sample, shape [N].
    """

    labels: np.ndarray
    seed: int
    _drawn: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    description = "balanced"

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def _positions(self) -> ShuffledOrder:
        return ShuffledOrder(self.num_samples, self.seed)

    def micro_batch_count(self, epoch: int, window: range, batch: int, world_size: int) -> int:
        return self._positions.micro_batch_count(epoch, window, batch, world_size)

    def micro_batches(
        self, epoch: int, window: range, batch: int, world_size: int, rank: int
    ) -> Iterator[list[Sample]]:
        drawn = self._of_epoch(epoch)
        for samples in self._positions.micro_batches(epoch, window, batch, world_size, rank):
            yield [
                sample._replace(index=int(drawn[sample.index]), partner=int(drawn[sample.partner]))
                for sample in samples
            ]

    def _of_epoch(self, epoch: int) -> np.ndarray:
        """Index of each of the samples of an epoch, class by class, shape [N]."""
        if epoch not in self._drawn:
            self._drawn.clear()
            self._drawn[epoch] = np.concatenate(list(self._classes(epoch)))
        return self._drawn[epoch]

    def _classes(self, epoch: int) -> Iterator[np.ndarray]:
        classes = np.unique(self.labels)
        size, rest = divmod(self.num_samples, len(classes))
        # The same classes get the remainder in every epoch, so the start of each class follows from the epoch.
        larger = set(np.random.default_rng([self.seed, len(classes)]).permutation(classes)[:rest].tolist())
        for label in classes.tolist():
            members = np.flatnonzero(self.labels == label)
            count = size + (label in larger)
            first, start = divmod(epoch * count, len(members))
            passes = -(-(start + count) // len(members))
            indices = np.concatenate(
                [
                    np.random.default_rng([self.seed, label, first + number]).permutation(members)
                    + number * self.num_samples
                    for number in range(passes)
                ]
            )
            yield indices[start : start + count]
