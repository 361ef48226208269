"""Batches of features in place of images: a frozen backbone has computed them once for each image."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lora_dist.data.batch import Batch, WorkerShard
from lora_dist.data.sampling.order import PADDING_INDEX, Sample


class Features(NamedTuple):
    """The inputs of a model's head, one for each sample of a split, with the labels.

    Attributes:
        values: inputs [N, …], on the CPU; zeros where the image could not be read.
        labels: int64 [N]; of several labels, 0 and 1 [N, labels].
        readable: bool [N].
    """

    values: Tensor
    labels: Tensor
    readable: Tensor

    def batch(self, indices: list[int], weights: Tensor) -> Batch:
        """The batch of these samples, with features as `pixel_values`; an unreadable one has weight 0."""
        rows = torch.tensor(indices).clamp(min=0)
        return Batch(
            pixel_values=self.values[rows],
            labels=self.labels[rows],
            weights=weights * self.readable[rows],
            indices=torch.tensor(indices),
        )


class TrainFeatures(Dataset):
    """Features of the training images, in the batches in which `TrainImages` gives the images."""

    def __init__(self, features: Features, skip_bad_images: bool) -> None:
        self._features = features
        self._skip = skip_bad_images

    def __getitems__(self, shard: WorkerShard) -> WorkerShard:
        return shard._replace(content=self._batch(shard.content) if shard.content else None)

    def finished(self, batch: Batch) -> Batch:
        """See `TrainImages.finished`."""
        return batch

    def padding_batch(self, device: torch.device) -> Batch:
        """A micro-batch of one sample of weight 0."""
        return self._batch([Sample(0, PADDING_INDEX, 0, PADDING_INDEX, 0.0)]).to(device)

    def _batch(self, samples: list[Sample]) -> Batch:
        weights = torch.tensor([sample.weight for sample in samples])
        batch = self._features.batch([sample.index for sample in samples], weights)
        return batch._replace(unreadable=(weights > 0) & (batch.weights == 0)) if self._skip else batch


class EvaluationFeatures(Dataset):
    """Features of an evaluation split, in the batches in which `EvaluationImages` gives the images."""

    def __init__(self, features: Features) -> None:
        self._features = features

    def __getitems__(self, indices: list[int]) -> Batch:
        batch = self._features.batch(indices, (torch.tensor(indices) != PADDING_INDEX).float())
        return batch._replace(indices=batch.indices.where(batch.weights > 0, PADDING_INDEX))

    def finished(self, batch: Batch) -> Batch:
        """See `EvaluationImages.finished`."""
        return batch
