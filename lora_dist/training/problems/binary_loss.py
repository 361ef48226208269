"""The loss of several labels: binary cross-entropy of each label, with smoothing and weights of the positives."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lora_dist.data.batch import Batch
from lora_dist.data.sources.load import ImageData
from lora_dist.data.sources.split import Split
from lora_dist.settings.train import Settings
from lora_dist.training.problems.class_weights import read_weights


class BinaryLoss(NamedTuple):
    """Settings of the loss of several labels; a `SampleLoss` in which all samples weigh the same.

    The loss of a sample is the mean over the labels, as in `transformers`. It is linear in the targets, so a mixed
    image has mixed targets.

    Attributes:
        label_smoothing: share of each target that is spread evenly over yes and no, as in Keras.
        positive_weights: float32 [labels], as the `pos_weight` of `binary_cross_entropy_with_logits`; None for ones.
    """

    label_smoothing: float = 0.0
    positive_weights: Tensor | None = None

    @property
    def weighs_samples(self) -> bool:
        return False

    def of_samples(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of each sample, shape [B]; `batch.labels` has 0 and 1 of each label, [B, labels]."""
        targets = batch.labels.float()
        if batch.partner_labels is not None and batch.shares is not None:
            targets = torch.lerp(batch.partner_labels.float(), targets, batch.shares[:, None])
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        weights = None if self.positive_weights is None else self.positive_weights.to(logits.device)
        losses = binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=weights)
        return losses.mean(dim=-1) * batch.weights

    def weights_of(self, labels: Tensor, partner_labels: Tensor | None = None, shares: Tensor | None = None) -> Tensor:
        """Ones, shape [B]: `positive_weights` change the loss of a sample, not its weight."""
        return torch.ones(len(labels), device=labels.device)


def make_binary_loss(settings: Settings, data: ImageData) -> BinaryLoss:
    """Builds the loss function for several labels per image.

    Raises:
        UserError: the file of --class_weights cannot be read, or does not give each label, and no other, a weight.
    """
    chosen, weights = settings.optimization.class_weights, None
    if chosen == "balanced":
        assert isinstance(data.train, Split)
        weights = balanced_positive_weights(data.train.labels)
    elif chosen != "none":
        weights = read_weights(chosen, data.labels)
    return BinaryLoss(settings.augmentation.label_smoothing_factor, weights)


def balanced_positive_weights(labels: np.ndarray) -> Tensor:
    """Returns the ratio of samples without each label to samples with it, float32 [labels]; 1 without either."""
    positives = labels.sum(axis=0, dtype=np.int64)
    negatives = len(labels) - positives
    weights = np.where((positives > 0) & (negatives > 0), negatives / np.maximum(positives, 1), 1.0)
    return torch.from_numpy(weights).float()
