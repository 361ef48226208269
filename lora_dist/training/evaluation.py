"""Exact metrics over the whole validation split: every sample once, for any number of processes and any remainder."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_dist.data.batch import Batch
from lora_dist.data.feature_batches import EvaluationFeatures, Features
from lora_dist.data.loader import batches, evaluation_loader
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sampling.order import PADDING_INDEX, evaluation_batches
from lora_dist.data.sources.split import Split
from lora_dist.errors import ProcessError, UserError
from lora_dist.metrics.calibration import ScoredSamples
from lora_dist.processes.workers import worker_loader
from lora_dist.settings.train import DataSettings
from lora_dist.training.problems.problem import ProblemType, by_sample
from lora_dist.training.problems.single_label_problem import SingleLabel

logger = logging.getLogger(__name__)

SHOWN = 8
MOST_LOGITS = 2**25
"""Largest number of logits that are kept of a split, 128 MB on each process: those of evenly spaced samples."""


class NothingToEvaluateError(UserError):
    """No validation image can be read; raised on every process."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on a split. Must be called on every process; each gets the same result.

    Attributes:
        model: as prepared; left in evaluation mode.
        transforms: of the model's processor.
        labels: class names in order.
        batch_size: samples in a forward pass of one process.
        temperature: the logits are divided by it; 1 in training.
        problem: decides which metrics are computed.
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
    problem: ProblemType = field(default_factory=SingleLabel)
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
    ) -> Any:
        """Runs the model on all samples, gathers the outcomes from all processes, and computes the metrics.

        Args:
            after_batch: called on all processes after each batch; what it raises ends the evaluation.
            with_probabilities: also return the probabilities of all classes, if the problem type does not keep them.
            keep_logits: also return logits (see `Evaluation.scored`); only for one class per image.

        Returns:
            The `EvaluationResult` of the problem type.

        Raises:
            NothingToEvaluateError: no image can be read.
            ProcessError: the device has no memory left.
        """
        accelerator = self.accelerator
        with_probabilities = with_probabilities and not self.problem.keeps_scores
        self.model.eval()
        parts: list[tuple[Tensor, Tensor]] = []
        kept_logits: list[tuple[Tensor, Tensor]] = []
        spacing = 1 if with_probabilities else self._spacing
        for batch in batches(self.loader, accelerator.device):
            with self._room_named():
                logits = _logits(self.model, batch) / self.temperature
                parts.append(self.problem.results(logits, batch))
            if with_probabilities or keep_logits:
                kept = batch.indices % spacing == 0
                # Logits of many classes take memory.
                kept_logits.append((batch.indices[kept, None], logits[kept].cpu()))
            after_batch()
        integers, reals = _gathered_rows(accelerator, parts)
        rows = integers[:, 0]
        assert np.array_equal(rows, np.unique(rows)), "a sample was counted twice"
        assert self.settings.on_bad_image == "skip" or len(rows) == len(self.split), "a sample was left out"
        if not len(rows):
            raise NothingToEvaluateError(
                f"none of the {self.name} images can be read: repair them, or choose others with --{self.name}_dir or "
                f"--{self.name}_split"
            )
        self._warn_of_non_finite(rows[~np.isfinite(reals).all(axis=1)])
        evaluation = self.problem.evaluation(self.split, self.labels, integers, reals)
        if not kept_logits:
            return evaluation
        indices, gathered = _gathered_rows(accelerator, kept_logits)
        rows, values = indices[:, 0], torch.from_numpy(gathered)
        if with_probabilities:
            probabilities = by_sample(self.split, rows, _probabilities(values).numpy(), np.nan)
            evaluation = replace(evaluation, probabilities=probabilities)
        if keep_logits:
            scored = ScoredSamples(values, torch.from_numpy(self.split.labels[rows]))
            evaluation = replace(evaluation, scored=scored.part(torch.from_numpy(rows) % self._spacing == 0))
        return evaluation

    @property
    def _spacing(self) -> int:
        """Logits of every sample at a multiple of this index are kept."""
        return -(-len(self.split) * len(self.labels) // MOST_LOGITS)

    def _warn_of_non_finite(self, rows: np.ndarray) -> None:
        """Logs the samples whose logits are not finite. They count as wrong, and the loss is NaN."""
        if len(rows):
            names = ", ".join(self.split.name(int(row)) for row in rows[:SHOWN])
            logger.warning(
                "the model's logits are not finite for %d of the %s images, which count as wrong; the loss cannot be "
                "computed: %s%s",
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
                    f"out of memory in an evaluation: {error}\nLower --per_device_eval_batch_size, which is "
                    f"{self.batch_size}. A training run resumes with --resume_from_checkpoint auto."
                ) from error
            raise


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Returns logits in fp32, shape [B, K]."""
    return model(pixel_values=batch.pixel_values).logits.float()


def _probabilities(logits: Tensor) -> Tensor:
    """Probability of every class, shape [N, K]; NaN where a logit is not finite."""
    return logits.softmax(dim=-1).where(logits.isfinite().all(dim=-1, keepdim=True), torch.nan)


def _gathered_rows(accelerator: Accelerator, parts: list[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Gathers the results of samples from all processes, which have different numbers of them.

    Args:
        parts: integers [B, I], of which the first is the index of the sample, and other values [B, …].

    Returns:
        Both for all samples, in the order of their indices, without padding.
    """
    integers, values = (
        accelerator.gather(
            accelerator.pad_across_processes(torch.cat(part).to(accelerator.device), dim=0, pad_index=PADDING_INDEX)
        )
        .cpu()
        .numpy()
        for part in zip(*parts, strict=True)
    )
    kept = np.flatnonzero(integers[:, 0] != PADDING_INDEX)
    kept = kept[np.argsort(integers[kept, 0], kind="stable")]
    return integers[kept], values[kept]
