"""Exact metrics over the whole validation split: every sample once, for any number of processes and any remainder."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from lora_dist.loader import batches
from lora_dist.metric import ClassificationMetric
from lora_dist.order import FILLER

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


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader, num_samples: int, num_classes: int
) -> Evaluation:
    """Runs the model over this process's batches and gathers one row a sample from all processes.

    Called on every process; each returns the same. Leaves the model in evaluation mode.

    Args:
        accelerator: of the launch.
        model: as prepared.
        loader: this process's part, from `loader.evaluation_loader`.
        num_samples: size of the whole split.
        num_classes: size of the label map.
    """
    model.eval()
    whole, real = [], []
    for batch in batches(loader):
        batch = batch.to(accelerator.device)
        logits = model(pixel_values=batch.pixel_values).logits.float()
        log_probabilities = logits.log_softmax(dim=-1)
        confidence, prediction = log_probabilities.max(dim=-1)
        own = log_probabilities.gather(1, batch.labels[:, None])
        rank = (log_probabilities > own).sum(dim=-1)
        whole.append(torch.stack([batch.indices, batch.labels, prediction, rank], dim=1))
        real.append(torch.stack([confidence.exp(), -own[:, 0]], dim=1))
    integers = _gathered(accelerator, torch.cat(whole), FILLER)
    reals = _gathered(accelerator, torch.cat(real), 0.0)
    kept = integers[:, 0] != FILLER
    integers, reals = integers[kept], reals[kept]
    ascending = np.argsort(integers[:, 0], kind="stable")
    integers, reals = integers[ascending], reals[ascending]
    assert np.array_equal(integers[:, 0], np.arange(num_samples)), "a sample was counted twice or left out"
    results: dict[str, Any] = ClassificationMetric(num_classes).compute(
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


def _gathered(accelerator: Accelerator, rows: torch.Tensor, filler: float) -> np.ndarray:
    """The rows of all processes, which have different numbers of them."""
    padded = accelerator.pad_across_processes(rows, dim=0, pad_index=filler)
    return accelerator.gather(padded).cpu().numpy()
