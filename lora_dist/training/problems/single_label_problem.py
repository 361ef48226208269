"""One class per image: cross-entropy, accuracy and its relatives, and the confusion matrix."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_dist.data.batch import Batch
from lora_dist.data.sources.load import ImageData
from lora_dist.data.sources.split import Split
from lora_dist.errors import UserError
from lora_dist.figures import confusion_picture
from lora_dist.metrics.calibration import ScoredSamples
from lora_dist.metrics.classification import TOP, ClassificationMetric
from lora_dist.metrics.intervals import Interval, Measured
from lora_dist.metrics.predictions import Predictions, write_predictions
from lora_dist.metrics.single_label import bootstrap_intervals, measure_classes
from lora_dist.metrics.slices import slice_metrics
from lora_dist.model.trained.decision import Decision, MostLikely
from lora_dist.settings.train import Settings
from lora_dist.training.problems.class_weights import make_loss
from lora_dist.training.problems.loss import Loss
from lora_dist.training.problems.problem import by_sample

NO_RANK = 2**31
"""The rank of a label if logits are not finite: outside the top k of any number of classes."""
SCALARS = ("accuracy", "balanced_accuracy", "top5_accuracy", "macro_f1", "loss", "calibration_error")
MAX_MATRIX = 100
"""Largest number of classes for a whole confusion matrix in evaluation.json."""


@dataclass(frozen=True)
class SingleLabelEvaluation:
    """Metrics of one evaluation, and the results of each sample.

    Attributes:
        metrics: scalars by name (`accuracy`, `loss` …).
        per_class: precision, recall, F1 and support of each class.
        confusion: rows of true class, predicted class and their number of samples, int64 [K, 3]; entries without
            samples are left out.
        predictions: predicted class of each sample, shape [N]; -1 where its image could not be read, or its logits are
            not finite.
        confidences: probability of the predicted class, shape [N]; NaN without one.
        losses: cross-entropy of each sample, shape [N]; NaN without a prediction.
        num_samples: samples that were evaluated: all whose image could be read.
        references: class of each sample, shape [N]; -1 where its image could not be read.
        groups: group of each sample, shape [N], if groups are known.
        slice_values: value of each sample, shape [N], by column of --slice_columns.
        probabilities: of every class, shape [N, K], if requested; NaN without a prediction.
        scored: logits and labels of the evaluated samples, or of evenly spaced ones, if requested.
    """

    metrics: dict[str, float]
    per_class: list[dict[str, float]]
    confusion: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray
    losses: np.ndarray
    num_samples: int
    references: np.ndarray
    groups: np.ndarray | None = None
    slice_values: Mapping[str, np.ndarray] = field(default_factory=dict)
    probabilities: np.ndarray | None = None
    scored: ScoredSamples | None = None

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """95% intervals of `accuracy` and `macro_f1`; computed when first asked for."""
        read = self.references >= 0
        return bootstrap_intervals(self.references[read], self.predictions[read], self._groups_of(read))

    @cached_property
    def slices(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Metrics by column of --slice_columns and its values; computed when first asked for."""
        read = np.flatnonzero(self.references >= 0)

        def measured(own: np.ndarray) -> Measured:
            return measure_classes(self.references[read[own]], self.predictions[read[own]], self._groups_of(read[own]))

        return {column: slice_metrics(values[read], measured) for column, values in self.slice_values.items()}

    def _groups_of(self, chosen: np.ndarray) -> np.ndarray | None:
        return None if self.groups is None else self.groups[chosen]


class SingleLabel:
    """One class per image; a `ProblemType`."""

    headline: ClassVar = "accuracy"
    labels_word: ClassVar = "classes"
    is_calibrated: ClassVar = True
    keeps_scores: ClassVar = False
    class_columns: ClassVar[Mapping[str, str]] = {
        "precision": "precision",
        "recall": "recall",
        "f1": "F1",
        "support": "images",
    }

    def loss(self, settings: Settings, data: ImageData) -> Loss:
        if settings.optimization.metric_for_best_model == "top5_accuracy" and len(data.labels) <= TOP:
            raise UserError(
                f"--metric_for_best_model top5_accuracy: it is always 1 with {len(data.labels)} classes; use accuracy"
            )
        return make_loss(settings, data)

    def results(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Index, label, prediction and rank of the label [B, 4]; confidence and loss [B, 2].

        If a logit of a sample is not finite, its prediction is -1, its rank `NO_RANK`, and confidence and loss are NaN.
        """
        log_probabilities = logits.log_softmax(dim=-1)
        confidence, prediction = log_probabilities.max(dim=-1)
        own = log_probabilities.gather(1, batch.labels[:, None])
        rank = (log_probabilities > own).sum(dim=-1)
        # Of logits that are not finite, the largest says nothing, and no class has a rank.
        finite = log_probabilities.isfinite().all(dim=-1)
        prediction, rank = prediction.where(finite, -1), rank.where(finite, NO_RANK)
        confidence, loss = confidence.exp().where(finite, torch.nan), (-own[:, 0]).where(finite, torch.nan)
        integers = torch.stack([batch.indices, batch.labels, prediction, rank], dim=1)
        return integers, torch.stack([confidence, loss], dim=1)

    def evaluation(
        self, split: Split, labels: Sequence[str], integers: np.ndarray, reals: np.ndarray
    ) -> SingleLabelEvaluation:
        rows = integers[:, 0]
        results: dict[str, Any] = ClassificationMetric(len(labels)).compute(
            predictions=integers[:, 2],
            references=integers[:, 1],
            confidences=reals[:, 0],
            ranks=integers[:, 3],
            losses=reals[:, 1],
        )
        return SingleLabelEvaluation(
            metrics={name: results[name] for name in SCALARS if name in results},
            per_class=results["per_class"],
            confusion=np.array(results["confusion"], dtype=np.int64).reshape(-1, 3),
            predictions=by_sample(split, rows, integers[:, 2], -1),
            confidences=by_sample(split, rows, reals[:, 0], np.nan),
            losses=by_sample(split, rows, reals[:, 1], np.nan),
            num_samples=len(rows),
            references=by_sample(split, rows, integers[:, 1], -1),
            groups=split.groups,
            slice_values=split.slices,
        )

    def decision(self, evaluation: SingleLabelEvaluation) -> Decision:
        return MostLikely()

    def fixed(self, decision: Decision) -> "SingleLabel":
        return self

    def caption(self, label: Any, labels: Sequence[str]) -> str:
        return labels[int(label)]

    def answers(
        self, evaluation: SingleLabelEvaluation, split: Split, indices: Sequence[int], labels: Sequence[str]
    ) -> list[str]:
        return [
            f"is {labels[split.labels[index]]}\n"
            f"predicted {labels[evaluation.predictions[index]]} {evaluation.confidences[index]:.0%}"
            for index in indices
        ]

    def pictures(self, evaluation: SingleLabelEvaluation, labels: Sequence[str]) -> dict[str, Image.Image]:
        return {"confusion_matrix": confusion_picture(evaluation.confusion, labels)}

    def details(self, evaluation: SingleLabelEvaluation, labels: Sequence[str]) -> dict[str, Any]:
        return {"confusion_matrix": _confusion_matrix(evaluation.confusion, labels)}

    def write_predictions(
        self, file: Path, evaluation: SingleLabelEvaluation, split: Split, labels: Sequence[str]
    ) -> None:
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

    def chance_level(self, evaluation: SingleLabelEvaluation) -> tuple[float, str]:
        """The share of the largest class, which a model reaches that always predicts it; NaN if it is the only one."""
        support = [row["support"] for row in evaluation.per_class if row["support"]]
        share = max(support) / sum(support) if len(support) > 1 else math.nan
        return share, "the share of the largest class"


def _confusion_matrix(confusion: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """The whole matrix for up to `MAX_MATRIX` classes; for more classes, its entries that are not 0."""
    if len(labels) > MAX_MATRIX:
        return {"labels": list(labels), "true_predicted_count": confusion.tolist()}
    matrix = np.zeros((len(labels), len(labels)), dtype=np.int64)
    matrix[confusion[:, 0], confusion[:, 1]] = confusion[:, 2]
    return {"labels": list(labels), "rows_true_columns_predicted": matrix.tolist()}
