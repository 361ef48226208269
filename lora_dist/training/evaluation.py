"""Exact metrics over the whole validation split: every sample once, for any number of processes and any remainder."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_dist.data.batch import Batch
from lora_dist.data.features import EvaluationFeatures, Features
from lora_dist.data.loader import batches, evaluation_loader
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sampling.order import PADDING_INDEX, evaluation_batches
from lora_dist.data.sources.split import Split
from lora_dist.errors import ProcessError, UserError
from lora_dist.metrics.calibration import ScoredSamples
from lora_dist.metrics.classification import ClassificationMetric
from lora_dist.metrics.intervals import Interval, bootstrap_intervals
from lora_dist.metrics.slices import slice_metrics
from lora_dist.processes.workers import worker_loader
from lora_dist.settings.train import DataSettings

logger = logging.getLogger(__name__)

SHOWN = 8
MOST_LOGITS = 2**25
"""Of more logits of a split, those of evenly spaced samples are kept, for 128 MB on each process."""
NO_RANK = 2**31
"""The rank of a label if logits are not finite: outside the top k of any number of classes."""
SCALARS = ("accuracy", "balanced_accuracy", "top5_accuracy", "macro_f1", "loss", "calibration_error")


class NothingToEvaluateError(UserError):
    """No validation image can be read; raised on every process."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one evaluation, and the results of each sample.

    Attributes:
        metrics: scalars by name (`accuracy`, `loss` …).
        per_class: precision, recall, F1 and support of each class.
        confusion: rows of true class, predicted class and their number of samples, int64 [K, 3]; none of 0 samples.
        predictions: predicted class of each sample, shape [N]; -1 where its image could not be read, or its logits are
            not finite.
        confidences: probability of that class, shape [N]; NaN there.
        losses: cross-entropy of each sample, shape [N]; NaN there.
        num_samples: samples that were evaluated: all whose image could be read.
        references: class of each sample, shape [N]; -1 where its image could not be read.
        groups: group of each sample, shape [N], if groups are known.
        slice_values: value of each sample, shape [N], by column of --slice_columns.
        probabilities: of every class, shape [N, K], if they were asked for; NaN where there is no prediction.
        scored: logits and labels of these samples, or of evenly spaced ones, if they were asked for.
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
        groups = None if self.groups is None else self.groups[read]
        return bootstrap_intervals(self.references[read], self.predictions[read], groups)

    @cached_property
    def slices(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Metrics by column of --slice_columns and its values; computed when first asked for."""
        read = self.references >= 0
        groups = None if self.groups is None else self.groups[read]
        return {
            column: slice_metrics(self.references[read], self.predictions[read], values[read], groups)
            for column, values in self.slice_values.items()
        }

    def worst(self, count: int) -> list[int]:
        """Samples with the highest losses, worst first."""
        return np.argsort(-self.losses, kind="stable")[: min(count, int((self.predictions >= 0).sum()))].tolist()


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on a split. Must be called on every process; each gets the same result.

    Attributes:
        accelerator: of the launch.
        model: as prepared; left in evaluation mode.
        split: to evaluate on.
        transforms: of the model's processor.
        labels: class names in order.
        batch_size: samples in a forward pass of one process.
        settings: of the loader.
        name: of the split.
        temperature: that the logits are divided by; 1 in training.
        features: of the split, to evaluate the head on in place of the images.
    """

    accelerator: Accelerator
    model: nn.Module
    split: Split
    transforms: ImageTransforms
    labels: list[str]
    batch_size: int
    settings: DataSettings
    name: Literal["validation", "test"] = "validation"
    temperature: float = 1.0
    features: Features | None = None

    @cached_property
    def loader(self) -> DataLoader:
        """The loader of this process. All evaluations share it, so its workers start once."""
        if self.features is not None:
            share = evaluation_batches(
                len(self.split), self.batch_size, self.accelerator.num_processes, self.accelerator.process_index
            )
            return worker_loader(EvaluationFeatures(self.features), batch_sampler=share, workers=0)
        return evaluation_loader(
            self.split,
            self.transforms,
            self.batch_size,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            self.settings,
            self.accelerator.device,
        )

    # Not inference_mode: FSDP2 could not train in the buffers that it makes in its first forward pass.
    @torch.no_grad()
    def __call__(
        self,
        after_batch: Callable[[], object] = lambda: None,
        with_probabilities: bool = False,
        keep_logits: bool = False,
    ) -> Evaluation:
        """Gathers the result of each sample from all processes, and computes the metrics.

        Args:
            after_batch: called on all processes after each batch; what it raises ends the evaluation.
            with_probabilities: keep the probabilities of all classes.
            keep_logits: also return logits (see `Evaluation.scored`).

        Raises:
            NothingToEvaluateError: no image can be read.
            ProcessError: the device has no memory left.
        """
        accelerator = self.accelerator
        self.model.eval()
        parts: list[tuple[Tensor, ...]] = []
        kept_logits = []
        spacing = -(-len(self.split) * len(self.labels) // MOST_LOGITS)
        for batch in batches(self.loader, accelerator.device):
            with self._room_named():
                logits = self.model(pixel_values=batch.pixel_values).logits.float() / self.temperature
                rows_of_batch = _rows(logits, batch)
            # Probabilities of many classes take memory.
            parts.append(rows_of_batch if with_probabilities else rows_of_batch[:2])
            if keep_logits:
                kept_logits.append(logits[batch.indices % spacing == 0].cpu())
            after_batch()
        integers = _gathered(accelerator, torch.cat([part[0] for part in parts]), PADDING_INDEX)
        reals = _gathered(accelerator, torch.cat([part[1] for part in parts]), 0.0)
        kept = integers[:, 0] != PADDING_INDEX
        integers, reals = integers[kept], reals[kept]
        ascending = np.argsort(integers[:, 0], kind="stable")
        integers, reals = integers[ascending], reals[ascending]
        probabilities = None
        if with_probabilities:
            gathered = _gathered(accelerator, torch.cat([part[2] for part in parts]), 0.0)
            probabilities = self._by_row(integers[:, 0], gathered[kept][ascending], np.nan)
        rows = integers[:, 0]
        assert np.array_equal(rows, np.unique(rows)), "a sample was counted twice"
        assert self.settings.on_bad_image == "skip" or len(rows) == len(self.split), "a sample was left out"
        if not len(rows):
            raise NothingToEvaluateError(
                f"none of the {self.name} images can be read: put them right, or name others by --{self.name}_dir or "
                f"--{self.name}_split"
            )
        self._warn_of_non_finite(rows[integers[:, 2] < 0])
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
            confusion=np.array(results["confusion"], dtype=np.int64).reshape(-1, 3),
            predictions=self._by_row(rows, integers[:, 2], -1),
            confidences=self._by_row(rows, reals[:, 0], np.nan),
            losses=self._by_row(rows, reals[:, 1], np.nan),
            num_samples=len(rows),
            references=self._by_row(rows, integers[:, 1], -1),
            groups=self.split.groups,
            slice_values=self.split.slices,
            probabilities=probabilities,
            scored=self._scored(kept_logits, parts, spacing) if keep_logits else None,
        )

    def _scored(self, logits: list[Tensor], parts: list[tuple[Tensor, ...]], spacing: int) -> ScoredSamples:
        """Gathers the logits of every `spacing`-th sample from all processes, in the order of the samples."""
        own = torch.cat([part[0] for part in parts])[:, :2]
        own = own[own[:, 0] % spacing == 0]
        integers = _gathered(self.accelerator, own, PADDING_INDEX)
        values = _gathered(self.accelerator, torch.cat(logits).to(own.device), 0.0)
        kept = np.flatnonzero(integers[:, 0] != PADDING_INDEX)
        kept = kept[np.argsort(integers[kept, 0], kind="stable")]
        return ScoredSamples(torch.from_numpy(values[kept]), torch.from_numpy(integers[kept, 1]))

    def _warn_of_non_finite(self, rows: np.ndarray) -> None:
        """Logs the samples whose logits are not finite. They count as wrong, and the loss is NaN."""
        if len(rows):
            names = ", ".join(self.split.name(int(row)) for row in rows[:SHOWN])
            logger.warning(
                "the model's logits are not finite for %d of the %s images, which count as wrong; the loss and the "
                "calibration error cannot be computed: %s%s",
                len(rows),
                self.name,
                names,
                " …" if len(rows) > SHOWN else "",
            )

    @contextmanager
    def _room_named(self) -> Iterator[None]:
        """Adds the setting that lowers the memory of an evaluation to an out-of-memory error."""
        try:
            yield
        except RuntimeError as error:
            if should_reduce_batch_size(error):
                raise ProcessError(
                    f"out of memory in an evaluation: {error}\nGo on with a lower --per_device_eval_batch_size, which "
                    f"is {self.batch_size}; a training goes on by --resume_from_checkpoint auto."
                ) from error
            raise

    def _by_row(self, rows: np.ndarray, values: np.ndarray, missing: float) -> np.ndarray:
        """Returns an array with one value per sample of the split; `missing` for those not evaluated."""
        whole = np.full((len(self.split), *values.shape[1:]), missing, dtype=values.dtype)
        whole[rows] = values
        return whole


def _rows(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns index, label, prediction and rank of the label [B, 4]; confidence and loss [B, 2]; probabilities [B, K].

    Where a logit is not finite the prediction is -1, the rank `NO_RANK`, the others are NaN.
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
    probabilities = log_probabilities.exp().where(finite[:, None], torch.nan)
    return integers, torch.stack([confidence, loss], dim=1), probabilities


def _gathered(accelerator: Accelerator, rows: Tensor, padding_batch: float) -> np.ndarray:
    """Gathers rows from all processes, which have different numbers of them."""
    padded = accelerator.pad_across_processes(rows, dim=0, pad_index=padding_batch)
    return accelerator.gather(padded).cpu().numpy()
