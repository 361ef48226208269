"""A training run that is ready to start: what the loop, the dry run and the benchmark work on."""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor

from lora_dist.data.batch import Batch, TrainImages
from lora_dist.data.feature_batches import TrainFeatures
from lora_dist.data.loader import batches, train_loader
from lora_dist.data.sampling.order import BatchPlan
from lora_dist.engines.engine import Engine
from lora_dist.processes.preemption import Preemption
from lora_dist.processes.watch import Watch
from lora_dist.settings.train import Settings
from lora_dist.training.evaluation import Evaluator
from lora_dist.training.problems.class_weights import planned_weight
from lora_dist.training.problems.loss import SampleLoss
from lora_dist.training.problems.problem_types import EvaluationResult
from lora_dist.training.progress import Progress
from lora_dist.training.reporting.tracking import Tracker
from lora_dist.training.saving.checkpointer import Checkpointer
from lora_dist.training.schedule import Schedule, is_due
from lora_dist.training.step import GradientAccumulator
from lora_dist.training.weight_average import WeightAverage


@dataclass(frozen=True)
class TrainingRun:
    """The parts of a training run, and its progress. Methods must be called on every process.

    Attributes:
        settings: resolved settings.
        engine: model and optimizer.
        average: moving average of the weights, which is evaluated and saved instead of them; None without --ema_decay.
        images: training images.
        plan: which samples train in which update.
        loss: of each sample.
        evaluator: computes the metrics of the current weights.
        preemption: requests from outside to stop or to save.
        tracker: log lines and TensorBoard.
        watch: ends the process if the run stalls.
        progress: where the run starts or resumes, and then where it is.
        features: of the training images, on which the head trains; None if it trains on the images.
    """

    settings: Settings
    engine: Engine
    average: WeightAverage | None
    images: TrainImages
    plan: BatchPlan
    loss: SampleLoss
    schedule: Schedule
    evaluator: Evaluator
    checkpointer: Checkpointer
    preemption: Preemption
    tracker: Tracker
    watch: Watch
    progress: Progress
    features: TrainFeatures | None = None

    def stream(
        self, first_step: int, last_step: int, timed: Callable[[Iterator[Any]], Iterator[Any]] = iter
    ) -> Generator[Batch]:
        """The micro-batches of this process from update `first_step` up to `last_step`, on its device.

        Args:
            first_step: first update.
            last_step: update after the last one.
            timed: as for `batches`.
        """
        device = self.engine.accelerator.device
        loader = train_loader(self._inputs, self.plan, first_step, last_step, self.settings.data, device)
        return batches(loader, device, timed)

    def begin_update(self, step: int, before_exchange: Callable[[], object] = lambda: None) -> GradientAccumulator:
        """Clears the gradient and sets the learning rate for update `step` (from 0).

        Args:
            step: index of the update.
            before_exchange: called before the last backward pass, which reduces the gradients over processes.
        """
        return GradientAccumulator(
            self.engine,
            micro_batch_count=self.plan.micro_batches_in(step),
            total_weight=self._total_weight(step),
            learning_rate=self.schedule.learning_rate(step),
            loss=self.loss,
            dropout_seed=(self.settings.run.seed, step),
            padding_batch=lambda: self._inputs.padding_batch(self.engine.accelerator.device),
            before_exchange=before_exchange,
        )

    @property
    def _inputs(self) -> TrainImages | TrainFeatures:
        return self.images if self.features is None else self.features

    def _total_weight(self, step: int) -> float:
        """The sum of the weights of all samples of an update, over all processes."""
        if not self.loss.weighs_samples:
            return self.plan.samples_in(step)
        accelerator = self.engine.accelerator
        own = planned_weight(self.loss, self.images, self.plan, step)
        return float(accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum"))

    @property
    def precision(self) -> str:
        """The precision of the model: no (fp32), bf16, fp16, or bf16_base (bf16, with trained parameters in fp32)."""
        in_bf16 = self.settings.model.base_dtype == "bfloat16"
        return "bf16_base" if in_bf16 else self.engine.accelerator.mixed_precision

    def result_weights(self) -> dict[str, Tensor]:
        """Returns the weights to evaluate and to write as the result: the average, if there is one."""
        return self.engine.trainable_state() if self.average is None else self.average.state()

    def with_result_weights(self) -> AbstractContextManager[None]:
        """A context in which the model has the weights of `result_weights`."""
        return nullcontext() if self.average is None else self.average.applied()

    def evaluate(
        self,
        name: str,
        evaluator: Evaluator | None = None,
        with_probabilities: bool = False,
        keep_logits: bool = False,
    ) -> EvaluationResult:
        """Evaluates the current weights; a request to stop ends the evaluation.

        Args:
            name: of this evaluation, for the watch.
            evaluator: that of other data than the validation split.
            with_probabilities: keep the probabilities of all classes.
            keep_logits: as for `Evaluator`.

        Raises:
            NothingToEvaluateError: no image can be read.
            StopRequested: a stop was requested.
        """
        numbers = count(2)

        def after_batch() -> None:
            number = next(numbers)
            # Other processes may still be starting their workers.
            self.watch.enter(f"{name}: batch {number}", extra_time=number == 2)
            self.preemption.check()

        self.watch.enter(f"{name}: batch 1", extra_time=True)
        return (evaluator or self.evaluator)(after_batch, with_probabilities, keep_logits)

    def save(self) -> None:
        """Saves a checkpoint."""
        self.watch.enter(f"saving after update {self.progress.step}", extra_time=True)
        self.tracker.flush()
        self.checkpointer.save(self.progress)
        self.watch.resume_hint = self.resume_hint

    @property
    def resume_hint(self) -> str:
        """A sentence that says how to resume; empty without a checkpoint."""
        saved = self.checkpointer.saved_step
        return "" if saved is None else f"--resume_from_checkpoint auto resumes from update {saved}."

    def is_due(self, every: int | Literal["epoch", "no"]) -> bool:
        """Whether an action with the interval `every` (updates, or an epoch) is due after this update."""
        return is_due(every, self.progress.step, self.plan.steps_per_epoch, self.schedule.total_steps)

    def is_over(self) -> bool:
        """Whether all updates are done, or early stopping has run out of patience."""
        patience = self.settings.optimization.early_stopping_patience
        return self.progress.is_over(self.schedule.total_steps, patience)

    def epoch(self, step: int) -> float:
        """Epochs trained after `step` updates."""
        return self.plan.samples_before(step) / self.plan.num_samples
