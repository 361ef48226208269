"""Writes what the result of a run says of each validation image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_dist.data.sources.split import Split
from lora_dist.metrics.predictions import Predictions, write_predictions
from lora_dist.training.evaluation import Evaluation


def write_validation_predictions(file: Path, evaluation: Evaluation, split: Split, labels: Sequence[str]) -> None:
    """Writes a line for each image that could be read; see `lora_dist/metrics/predictions.py`."""
    read = np.flatnonzero(evaluation.references >= 0).tolist()
    names, groups = split.names(), split.groups
    predicted = evaluation.predictions.tolist()
    predictions = Predictions(
        paths=[names[row] for row in read],
        predicted=[labels[predicted[row]] if predicted[row] >= 0 else None for row in read],
        given=[labels[label] for label in evaluation.references[read].tolist()],
        groups=[None if groups is None else str(groups[row]) for row in read],
        classes=list(labels),
        probabilities=None if evaluation.probabilities is None else evaluation.probabilities[read],
    )
    scores = [float(score) if np.isfinite(score) else None for score in evaluation.confidences[read]]
    write_predictions(file, predictions, scores)
