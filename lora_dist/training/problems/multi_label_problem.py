"""Several labels per image: binary cross-entropy, mean average precision, F1, and a threshold of each label."""

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
from torch.nn.functional import binary_cross_entropy_with_logits

from lora_dist.data.batch import Batch
from lora_dist.data.sources.load import ImageData
from lora_dist.data.sources.split import Split
from lora_dist.metrics.intervals import Interval, Measured
from lora_dist.metrics.multi_label import best_threshold, multi_label_metrics
from lora_dist.metrics.multi_label_intervals import measure_label_sets
from lora_dist.metrics.predictions import Predictions, write_predictions
from lora_dist.metrics.slices import slice_metrics
from lora_dist.model.trained.decision import AboveThresholds, Decision
from lora_dist.settings.train import Settings
from lora_dist.training.problems.binary_loss import BinaryLoss, make_binary_loss
from lora_dist.training.problems.problem import by_sample


@dataclass(frozen=True)
class LabelSetEvaluation:
    """Metrics of one evaluation of several labels, and the results of each sample.

    Attributes:
        metrics: `mAP`, `micro_f1`, `macro_f1` and `loss`.
        per_class: metrics of each label; see `multi_label_metrics`.
        thresholds: of each label, float32 [labels].
        scores: of each sample and label, float32 [N, labels]; NaN where its image could not be read, or its logits are
            not finite.
        losses: binary cross-entropy of each sample, shape [N]; NaN where its scores are.
        read: samples that were evaluated, ascending: all whose image could be read.
        references: the labels of each sample, bool [N, labels].
        groups: group of each sample, shape [N], if groups are known.
        slice_values: value of each sample, shape [N], by column of --slice_columns.
        scored: none, because no temperature is fitted.
    """

    metrics: dict[str, float]
    per_class: list[dict[str, Any]]
    thresholds: np.ndarray
    scores: np.ndarray
    losses: np.ndarray
    read: np.ndarray
    references: np.ndarray
    groups: np.ndarray | None = None
    slice_values: Mapping[str, np.ndarray] = field(default_factory=dict)
    scored: None = None

    @property
    def num_samples(self) -> int:
        """Samples that were evaluated."""
        return len(self.read)

    @cached_property
    def predicted(self) -> np.ndarray:
        """Whether the score of each label reaches its threshold, bool [N, labels]."""
        return self.scores >= self.thresholds

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """95% intervals of `mAP`, `micro_f1` and `macro_f1`; computed when first asked for."""
        return self._measured(self.read).intervals

    @cached_property
    def slices(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Metrics by column of --slice_columns and its values; computed when first asked for."""
        return {
            column: slice_metrics(values[self.read], lambda own: self._measured(self.read[own]))
            for column, values in self.slice_values.items()
        }

    def _measured(self, chosen: np.ndarray) -> Measured:
        groups = None if self.groups is None else self.groups[chosen]
        return measure_label_sets(self.predicted[chosen], self.references[chosen], self.scores[chosen], groups)


@dataclass(frozen=True)
class MultiLabel:
    """Several labels per image; a `ProblemType`.

    Attributes:
        thresholds: of each label, to measure with; None to choose them by F1 on the data that is evaluated.
    """

    thresholds: tuple[float, ...] | None = None
    headline: ClassVar = "mAP"
    labels_word: ClassVar = "labels"
    is_calibrated: ClassVar = False
    keeps_scores: ClassVar = True
    class_columns: ClassVar[Mapping[str, str]] = {
        "average_precision": "average precision",
        "precision": "precision",
        "recall": "recall",
        "f1": "F1",
        "threshold": "threshold",
        "support": "images",
    }

    def loss(self, settings: Settings, data: ImageData) -> BinaryLoss:
        return make_binary_loss(settings, data)

    def results(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Index [B, 1]; loss and the score of each label [B, 1 + labels], all NaN where a logit is not finite."""
        losses = binary_cross_entropy_with_logits(logits, batch.labels.float(), reduction="none").mean(dim=-1)
        reals = torch.cat([losses[:, None], logits.sigmoid()], dim=1)
        finite = logits.isfinite().all(dim=-1, keepdim=True)
        return batch.indices[:, None], reals.where(finite, torch.nan)

    def evaluation(
        self, split: Split, labels: Sequence[str], integers: np.ndarray, reals: np.ndarray
    ) -> LabelSetEvaluation:
        rows = integers[:, 0]
        references, scores = split.labels.astype(bool), reals[:, 1:]
        thresholds = self._thresholds(scores, references[rows])
        metrics, per_class = multi_label_metrics(scores, references[rows], thresholds)
        whole = by_sample(split, rows, reals, np.nan)
        return LabelSetEvaluation(
            metrics={**metrics, "loss": float(reals[:, 0].astype(np.float64).mean())},
            per_class=per_class,
            thresholds=thresholds,
            scores=whole[:, 1:],
            losses=whole[:, 0],
            read=rows,
            references=references,
            groups=split.groups,
            slice_values=split.slices,
        )

    def _thresholds(self, scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
        chosen = self.thresholds or [best_threshold(*columns) for columns in zip(scores.T, positive.T, strict=True)]
        return np.array(chosen, dtype=np.float32)

    def decision(self, evaluation: LabelSetEvaluation) -> Decision:
        return AboveThresholds(tuple(evaluation.thresholds.tolist()))

    def fixed(self, decision: Decision) -> "MultiLabel":
        assert isinstance(decision, AboveThresholds)
        return MultiLabel(decision.thresholds)

    def caption(self, label: Any, labels: Sequence[str]) -> str:
        return _names(np.asarray(label), labels)

    def answers(
        self, evaluation: LabelSetEvaluation, split: Split, indices: Sequence[int], labels: Sequence[str]
    ) -> list[str]:
        predicted = evaluation.predicted
        return [
            f"is {_names(split.labels[index], labels)}\npredicted {_names(predicted[index], labels)}"
            for index in indices
        ]

    def pictures(self, evaluation: LabelSetEvaluation, labels: Sequence[str]) -> dict[str, Image.Image]:
        """None: a confusion matrix has one class of each image."""
        return {}

    def details(self, evaluation: LabelSetEvaluation, labels: Sequence[str]) -> dict[str, Any]:
        return {"thresholds": self.decision(evaluation).record(labels)}

    def write_predictions(
        self, file: Path, evaluation: LabelSetEvaluation, split: Split, labels: Sequence[str]
    ) -> None:
        names, predicted, groups, read = split.names(), evaluation.predicted, split.groups, evaluation.read.tolist()
        predictions = Predictions(
            paths=[names[row] for row in read],
            predicted=[_labels(predicted[row], labels) for row in read],
            given=[_labels(split.labels[row], labels) for row in read],
            groups=[None if groups is None else str(groups[row]) for row in read],
            classes=list(labels),
            probabilities=evaluation.scores[read],
            multi_label=True,
        )
        write_predictions(file, predictions)

    def chance_level(self, evaluation: LabelSetEvaluation) -> tuple[float, str]:
        """The mean share of the images that have a label, which is the mAP of random scores."""
        shares = [row["support"] / max(1, evaluation.num_samples) for row in evaluation.per_class if row["support"]]
        return float(np.mean(shares)) if shares else math.nan, "that of random scores"


def _labels(row: np.ndarray, labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(labels[index] for index in np.flatnonzero(row).tolist())


def _names(row: np.ndarray, labels: Sequence[str]) -> str:
    return ", ".join(_labels(row, labels)) or "(none)"
