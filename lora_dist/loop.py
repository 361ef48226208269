"""The training loop: one exact update from its micro-batches, and the sequence of updates, evaluations and saves."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_dist.config import Settings
from lora_dist.engine import Engine
from lora_dist.errors import TrainingStoppedError
from lora_dist.evaluation import Evaluator
from lora_dist.loader import Batch, TrainImages, batches, train_loader
from lora_dist.model import set_training
from lora_dist.order import Order
from lora_dist.report import show_evaluation
from lora_dist.schedule import Schedule, is_due
from lora_dist.state import Checkpointer, Progress
from lora_dist.tracking import Tracker, peak_memory_mb
from lora_dist.transforms import seed_of


class Update(NamedTuple):
    """What one update did.

    Attributes:
        loss: mean over all its samples, on all processes.
        grad_norm: before clipping.
        skipped: whether fp16 loss scaling left the update out.
    """

    loss: float
    grad_norm: float
    skipped: bool


class NonFiniteLossError(Exception):
    """The loss or gradient of an update is not finite; the weights are as they were before it."""

    def __init__(self, what: str, indices: list[int]) -> None:
        super().__init__(what)
        self.what = what
        self.indices = indices


@dataclass(frozen=True)
class Job:
    """The parts that `fit` drives, as built by `train`.

    Attributes:
        settings: of the run.
        engine: the model and its optimizer.
        images: what to train on.
        order: which of them come when.
        schedule: of the learning rate.
        evaluator: exact metrics of the model as it is.
        checkpointer: saves the run.
        tracker: shows it.
    """

    settings: Settings
    engine: Engine
    images: TrainImages
    order: Order
    schedule: Schedule
    evaluator: Evaluator
    checkpointer: Checkpointer
    tracker: Tracker


def batch_loss(logits: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """Weighted cross-entropy of each sample, shape [B], towards both labels of mixed images."""
    own = cross_entropy(logits, batch.labels, reduction="none", label_smoothing=label_smoothing)
    if batch.partner_labels is not None and batch.shares is not None:
        partner = cross_entropy(logits, batch.partner_labels, reduction="none", label_smoothing=label_smoothing)
        own = batch.shares * own + (1 - batch.shares) * partner
    return own * batch.weights


def train_step(
    engine: Engine,
    micro_batches: Iterable[Batch],
    *,
    micro_batch_count: int,
    sample_count: int,
    learning_rate: float,
    max_grad_norm: float,
    label_smoothing: float,
    dropout_seed: tuple[int, ...],
) -> Update:
    """One update whose gradient is that of the mean loss over its samples, however they are split.

    Every sample counts 1 / `sample_count`, over micro-batches and processes of any size; dividing by the number
    of micro-batches instead would mis-scale a last, smaller window (transformers#39659).

    Args:
        engine: its model in training mode.
        micro_batches: this process's share.
        micro_batch_count: their number, the same on every process.
        sample_count: samples over all micro-batches and processes.
        learning_rate: of this update.
        max_grad_norm: bound on the gradient's norm; 0 for none.
        label_smoothing: share of the target spread over all classes.
        dropout_seed: decides the dropout of this update.

    Raises:
        NonFiniteLossError: before the update is made.
    """
    accelerator = engine.accelerator
    device = accelerator.device
    engine.begin_update(learning_rate)
    total = torch.zeros((), device=device)
    suspects: list[tuple[Tensor, Tensor]] = []
    for place, host_batch in enumerate(micro_batches):
        batch = host_batch.to(device)
        torch.manual_seed(seed_of((*dropout_seed, place, accelerator.process_index)))
        with engine.micro_batch(last=place == micro_batch_count - 1):
            losses = batch_loss(engine.model(pixel_values=batch.pixel_values).logits, batch, label_smoothing)
            engine.backward(losses.sum() / sample_count)
        total += losses.detach().sum()
        suspects.append((batch.indices, losses.detach()))
    loss = float(accelerator.reduce(total, "sum")) / sample_count
    if not math.isfinite(loss):
        raise NonFiniteLossError("loss", [int(row) for rows, seen in suspects for row in rows[~seen.isfinite()]])
    try:
        grad_norm = engine.step(max_grad_norm)
    except ArithmeticError as error:
        raise NonFiniteLossError("gradient", [int(row) for rows, _ in suspects for row in rows]) from error
    return Update(loss, grad_norm, engine.was_skipped())


def fit(job: Job, progress: Progress) -> None:
    """Trains from where `progress` stands to the end of the schedule, or until it stops getting better.

    Called on every process. Changes `progress` as it goes.

    Raises:
        TrainingStoppedError: the loss is not finite; the last good state has been saved.
    """
    settings, order, total = job.settings, job.order, job.schedule.total_steps
    optimization, run = settings.optimization, settings.run
    window = Window()
    device = job.engine.accelerator.device
    loader = train_loader(job.images, order, progress.step, total, settings.data, device)
    stream = window.timed(batches(loader))
    set_training(job.engine.model)
    while progress.step < total and not _exhausted(progress, optimization.early_stopping_patience):
        step = progress.step
        micro_batch_count = order.micro_batches_in(step)
        window.start_update()
        try:
            update = train_step(
                job.engine,
                islice(stream, micro_batch_count),
                micro_batch_count=micro_batch_count,
                sample_count=order.samples_in(step),
                learning_rate=job.schedule.learning_rate(step),
                max_grad_norm=optimization.max_grad_norm,
                label_smoothing=settings.augmentation.label_smoothing_factor,
                dropout_seed=(run.seed, step),
            )
        except NonFiniteLossError as error:
            job.checkpointer.save(progress)
            raise _stopped(job, step, error) from error
        progress.train_seconds += window.end_update(order.samples_in(step), update)
        progress.samples += order.samples_in(step)
        progress.step += 1
        progress.loss_sum += update.loss
        progress.skipped_updates += update.skipped
        job.tracker.advance(progress.step, window.loss_sum / window.updates, window.samples_per_second)

        def due(every: Any) -> bool:
            return is_due(every, progress.step, order.steps_per_epoch, total)

        if progress.step % run.logging_steps == 0 or progress.step == total:
            _log_training(job, progress, window)
            window.reset()
        best = False
        if due(run.eval_steps):
            best = _evaluate(job, progress)
            set_training(job.engine.model)
        if best or due(run.checkpointing_steps):
            job.checkpointer.save(progress)


class Window:
    """Times the updates since the last log: how long they took, and how much of that was waiting for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts a new window."""
        self.seconds = self.waited = self.loss_sum = self.grad_norm = 0.0
        self.samples = self.updates = 0

    @property
    def samples_per_second(self) -> float:
        """Over all processes."""
        return self.samples / max(self.seconds, 1e-9)

    def timed(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with the time until each arrives counted as waiting."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(stream)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield batch

    def start_update(self) -> None:
        """Called before an update."""
        self._started = time.perf_counter()

    def end_update(self, samples: int, update: Update) -> float:
        """Called after it; its loss has been read, so the device has finished. Returns its seconds."""
        seconds = time.perf_counter() - self._started
        self.seconds += seconds
        self.samples += samples
        self.updates += 1
        self.loss_sum += update.loss
        self.grad_norm = update.grad_norm
        return seconds


def _exhausted(progress: Progress, patience: int | None) -> bool:
    return patience is not None and progress.stale_evaluations >= patience


def _epoch(job: Job, step: int) -> float:
    return job.order.samples_before(step) / job.order.num_samples


def _log_training(job: Job, progress: Progress, window: Window) -> None:
    step = progress.step
    values = {
        "train/loss": window.loss_sum / window.updates,
        "train/learning_rate": job.schedule.learning_rate(step - 1),
        "train/grad_norm": window.grad_norm,
        "train/samples_per_second": window.samples_per_second,
        "train/data_wait": min(1.0, window.waited / max(window.seconds, 1e-9)),
        "train/peak_memory_mb": peak_memory_mb(job.engine.accelerator.device),
        "train/skipped_updates": float(progress.skipped_updates),
    }
    job.tracker.scalars(step, _epoch(job, step), values)
    left = (job.schedule.total_steps - step) * window.seconds / window.updates
    job.tracker.progress_line(step, _epoch(job, step), values, left)


def _evaluate(job: Job, progress: Progress) -> bool:
    """Evaluates, logs and notes the result; True where it is the best so far."""
    evaluation = job.evaluator()
    name = job.settings.optimization.metric_for_best_model
    best = progress.note_evaluation(evaluation.metrics[name], lower_is_better=name == "loss")
    job.tracker.scalars(
        progress.step,
        _epoch(job, progress.step),
        {f"eval/{metric}": value for metric, value in evaluation.metrics.items()},
    )
    shown = "  ".join(f"{metric} {value:.4f}" for metric, value in evaluation.metrics.items())
    job.tracker.say(f"eval at step {progress.step}: {shown}{'  (best)' if best else ''}")
    show_evaluation(job.tracker, evaluation, progress.step, job.evaluator.split, job.evaluator.labels)
    return best


def _stopped(job: Job, step: int, error: NonFiniteLossError) -> TrainingStoppedError:
    names = sorted(set(gather_object([job.images.split.name(row) for row in error.indices])))
    shown = "\n  ".join(names[:8] + ([f"… and {len(names) - 8} more"] if len(names) > 8 else []))
    return TrainingStoppedError(
        f"the {error.what} of update {step + 1} is not finite. The update was not made; --resume_from_checkpoint auto "
        f"goes on from before it. A lower --learning_rate, --max_grad_norm or a warm-up may help. "
        f"Samples:\n  {shown}"
    )
