"""A training split in which every class comes equally often (`--balanced_sampling`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_dist.data.sampling.balanced import BalancedOrder
from lora_dist.data.sampling.order import SampleOrder
from lora_dist.data.sampling.training_split import EncodedSample, Reader
from lora_dist.data.sources.split import Split


@dataclass(frozen=True)
class OversampledSplit:
    """A split in a `BalancedOrder`; index i + r * samples is repetition r of sample i."""

    split: Split

    def __len__(self) -> int:
        return len(self.split)

    @property
    def labels(self) -> np.ndarray:
        """Class of each sample, shape [N]."""
        return self.split.labels

    @property
    def label_shape(self) -> tuple[int, ...]:
        return self.split.label_shape

    def name(self, index: int) -> str:
        return self.split.name(index % len(self.split))

    def fingerprint(self) -> str:
        return self.split.fingerprint()

    def describe(self) -> dict[str, Any]:
        return self.split.describe()

    def sample_order(self, seed: int) -> SampleOrder:
        return BalancedOrder(self.split.labels, seed)

    def reader(self) -> Reader:
        return _Repeating(self.split.reader(), len(self.split))


@dataclass(frozen=True)
class _Repeating:
    reader_of_split: Reader
    num_samples: int

    def read(self, epoch: int, indices: Sequence[int]) -> Mapping[int, EncodedSample]:
        originals = [index % self.num_samples for index in indices]
        found = self.reader_of_split.read(epoch, list(dict.fromkeys(originals)))
        return {index: found[original] for index, original in zip(indices, originals, strict=True)}
