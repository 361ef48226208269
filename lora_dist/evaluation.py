"""Exact metrics over the whole validation split: every sample once, for any number of processes and any remainder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_dist.config import DataSettings
from lora_dist.data import Split
from lora_dist.loader import Batch, batches, evaluation_loader
from lora_dist.metric import ClassificationMetric
from lora_dist.order import FILLER
from lora_dist.transforms import ImageTransforms

SCALARS = ("accuracy", "top5_accuracy", "macro_f1", "loss", "calibration_error")


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one evaluation, and the row of each sample behind them.

    Attributes:
        metrics: scalars by name (`accuracy`, `loss` …).
        per_class: precision, recall, F1 and support of each class.
        confusion: counts [true class, predicted class].
        predictions: predicted class of each sample, shape [N].
        confidences: probability of that class, shape [N].
        losses: cross-entropy of each sample, shape [N].
    """

    metrics: dict[str, float]
    per_class: list[dict[str, float]]
    confusion: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray
    losses: np.ndarray

    def worst(self, count: int) -> list[int]:
        """Samples with the highest losses, worst first."""
        return np.argsort(-self.losses, kind="stable")[:count].tolist()


@dataclass(frozen=True)
class Evaluator:
    """Runs a model over the validation split. Called on every process; each gets the same result.

    Attributes:
        accelerator: of the launch.
        model: as prepared; left in evaluation mode.
        split: to evaluate on.
        transforms: of the model's processor.
        labels: class names in order.
        batch_size: samples in a forward pass of one process.
        settings: of the loader.
    """

    accelerator: Accelerator
    model: nn.Module
    split: Split
    transforms: ImageTransforms
    labels: list[str]
    batch_size: int
    settings: DataSettings

    @torch.inference_mode()
    def __call__(self, after_batch: Callable[[], object] = lambda: None) -> Evaluation:
        """Gathers one row a sample from all processes, and computes the metrics.

        Args:
            after_batch: called on all processes after each batch; what it raises ends the evaluation.
        """
        accelerator = self.accelerator
        loader = evaluation_loader(
            self.split,
            self.transforms,
            self.batch_size,
            accelerator.num_processes,
            accelerator.process_index,
            self.settings,
            accelerator.device,
        )
        self.model.eval()
        parts = []
        for batch in batches(loader):
            parts.append(_rows(self.model, batch.to(accelerator.device)))
            after_batch()
        integers = _gathered(accelerator, torch.cat([part[0] for part in parts]), FILLER)
        reals = _gathered(accelerator, torch.cat([part[1] for part in parts]), 0.0)
        kept = integers[:, 0] != FILLER
        integers, reals = integers[kept], reals[kept]
        ascending = np.argsort(integers[:, 0], kind="stable")
        integers, reals = integers[ascending], reals[ascending]
        assert np.array_equal(integers[:, 0], np.arange(len(self.split))), "a sample was counted twice or left out"
        results: dict[str, Any] = ClassificationMetric(len(self.labels)).compute(
            predictions=integers[:, 2],
            references=integers[:, 1],
            confidences=reals[:, 0],
            ranks=integers[:, 3],
            losses=reals[:, 1],
        )
        return Evaluation(
            metrics={name: results[name] for name in SCALARS},
            per_class=results["per_class"],
            confusion=np.array(results["confusion_matrix"]),
            predictions=integers[:, 2],
            confidences=reals[:, 0],
            losses=reals[:, 1],
        )


def _rows(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each sample its row, label, prediction and rank of the label [B, 4]; confidence and loss [B, 2]."""
    log_probabilities = model(pixel_values=batch.pixel_values).logits.float().log_softmax(dim=-1)
    confidence, prediction = log_probabilities.max(dim=-1)
    own = log_probabilities.gather(1, batch.labels[:, None])
    rank = (log_probabilities > own).sum(dim=-1)
    integers = torch.stack([batch.indices, batch.labels, prediction, rank], dim=1)
    return integers, torch.stack([confidence.exp(), -own[:, 0]], dim=1)


def _gathered(accelerator: Accelerator, rows: Tensor, filler: float) -> np.ndarray:
    """The rows of all processes, which have different numbers of them."""
    padded = accelerator.pad_across_processes(rows, dim=0, pad_index=filler)
    return accelerator.gather(padded).cpu().numpy()
