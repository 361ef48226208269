"""The loss of each sample: cross-entropy with label smoothing, class weights and focal loss, also of mixed images."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_dist.data.batch import Batch


class SampleLoss(Protocol):
    """Computes the loss of each sample, and the weight of the sample in the mean over an update."""

    @property
    def weighs_samples(self) -> bool:
        """Whether `weights_of` differs between samples."""

    def of_samples(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of each sample, shape [B], towards both labels of mixed images; 0 for samples of weight 0."""

    def weights_of(self, labels: Tensor, partner_labels: Tensor | None = None, shares: Tensor | None = None) -> Tensor:
        """The weight of each sample by its labels, shape [B]."""


class Loss(NamedTuple):
    """Settings of the loss of one class per image; a `SampleLoss`.

    Attributes:
        label_smoothing: share of the target that is spread over all classes.
        class_weights: float32 [classes], as the `weight` of `torch.nn.functional.cross_entropy`; None for no weights.
        focal_gamma: exponent of focal loss (https://arxiv.org/abs/1708.02002); 0 for cross-entropy.
    """

    label_smoothing: float = 0.0
    class_weights: Tensor | None = None
    focal_gamma: float = 0.0

    @property
    def weighs_samples(self) -> bool:
        return self.class_weights is not None

    def of_samples(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of each sample, shape [B], towards both labels of mixed images; 0 for samples of weight 0."""
        own = self._towards(logits, batch.labels)
        if batch.partner_labels is not None and batch.shares is not None:
            own = batch.shares * own + (1 - batch.shares) * self._towards(logits, batch.partner_labels)
        return own * batch.weights

    def _towards(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        loss = cross_entropy(logits, labels, weights, reduction="none", label_smoothing=self.label_smoothing)
        if self.focal_gamma:
            own = logits.log_softmax(dim=-1).gather(1, labels[:, None])[:, 0]
            # The slope of a power below 1 is infinite at 0.
            loss = loss * (-torch.expm1(own)).clamp(min=1e-6) ** self.focal_gamma
        return loss

    def weights_of(self, labels: Tensor, partner_labels: Tensor | None = None, shares: Tensor | None = None) -> Tensor:
        """The weight of each sample by its labels, shape [B]; 1 without class weights."""
        if self.class_weights is None:
            return torch.ones(len(labels), device=labels.device)
        weights = self.class_weights.to(labels.device)
        own = weights[labels]
        if partner_labels is not None and shares is not None:
            own = shares * own + (1 - shares) * weights[partner_labels]
        return own
