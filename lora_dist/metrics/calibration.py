"""Calibration of confidences: the temperature, its effect, and the images above a threshold of confidence."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_dist.metrics.classification import CALIBRATION_BINS, binned, expected_calibration_error

TEMPERATURES = (0.1, 10.0)
"""Lowest and highest temperature that is tried."""
_HALVINGS = 24
"""Halvings of the interval that contains the temperature, which leave an error of less than one millionth."""


class ScoredSamples(NamedTuple):
    """Logits [N, classes], float32, and labels [N] of samples, on the CPU."""

    logits: Tensor
    labels: Tensor

    def part(self, chosen: Tensor) -> "ScoredSamples":
        """The samples that a mask [N] chooses."""
        return ScoredSamples(self.logits[chosen], self.labels[chosen])


class Confidences(NamedTuple):
    """Probability of the prediction, whether it is right, and loss of each sample, all of shape [N]."""

    confidence: np.ndarray
    correct: np.ndarray
    loss: np.ndarray

    def calibration_error(self) -> float:
        """Mean gap between confidence and accuracy (see `expected_calibration_error`)."""
        return expected_calibration_error(self.confidence, self.correct)


class ReliabilityBin(NamedTuple):
    """Mean confidence and accuracy of the `samples` whose confidence lies in one of equal intervals."""

    confidence: float
    accuracy: float
    samples: int


class Coverage(NamedTuple):
    """Share of samples whose confidence is at least `min_confidence`, and the accuracy on these; None without any."""

    min_confidence: float
    answered: float
    accuracy: float | None


def fit_temperature(samples: ScoredSamples) -> float | None:
    """Returns the temperature with the lowest cross-entropy; None if that lies outside `TEMPERATURES`.

    If all predictions are right, the cross-entropy has no minimum: it falls with the temperature.
    """
    own = samples.logits.gather(1, samples.labels[:, None])[:, 0].double()

    def slope(log_scale: float) -> float:
        """Derivative of the cross-entropy by the inverse of the temperature, in which the cross-entropy is convex."""
        probabilities = (samples.logits * math.exp(log_scale)).softmax(dim=-1)
        return float(((probabilities * samples.logits).sum(dim=-1).double() - own).mean())

    low, high = sorted(-math.log(temperature) for temperature in TEMPERATURES)
    if not slope(low) < 0 < slope(high):
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def confidences(samples: ScoredSamples, temperature: float = 1.0) -> Confidences:
    """Divides the logits by a temperature; returns each sample's highest probability, if it is right, and its loss."""
    logits = samples.logits / temperature
    best = logits.softmax(dim=-1).max(dim=-1)
    loss = cross_entropy(logits, samples.labels, reduction="none")
    return Confidences(best.values.numpy(), (best.indices == samples.labels).numpy(), loss.numpy())


def cross_fitted(samples: ScoredSamples) -> Confidences | None:
    """Computes confidences of each half of the samples at the temperature of the other half.

    Each half has every second sample of a class. Returns None if a half has no temperature.
    """
    ascending = torch.argsort(samples.labels, stable=True)
    is_even = torch.empty(len(ascending), dtype=torch.bool)
    is_even[ascending] = torch.arange(len(ascending)) % 2 == 0
    halves = samples.part(is_even), samples.part(~is_even)
    first, second = map(fit_temperature, halves)
    if first is None or second is None:
        return None
    found = map(confidences, halves, (second, first))
    return Confidences(*(np.concatenate(values) for values in zip(*found, strict=True)))


def reliability(scored: Confidences) -> list[ReliabilityBin]:
    """Returns confidence and accuracy in equal intervals of confidence, those of the calibration error."""
    counts, *sums = binned(scored.confidence, scored.correct, CALIBRATION_BINS)
    means = (total / np.maximum(counts, 1) for total in sums)
    return [ReliabilityBin(float(a), float(b), int(n)) for a, b, n in zip(*means, counts, strict=True)]


def coverage(confidence: np.ndarray, correct: np.ndarray, thresholds: Sequence[float]) -> list[Coverage]:
    """Returns the share of the samples above each threshold of confidence, and their accuracy.

    Args:
        confidence: [N], of the predictions.
        correct: [N], whether they are right.
    """
    rows = []
    for threshold in thresholds:
        answered = confidence >= threshold
        accuracy = float(correct[answered].mean()) if answered.any() else None
        rows.append(Coverage(threshold, float(answered.mean()), accuracy))
    return rows
