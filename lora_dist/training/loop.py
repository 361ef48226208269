"""The training loop: the sequence of updates, logs, evaluations and saves, and where it may be left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch.utils.data import DataLoader

from lora_dist.config import Settings
from lora_dist.data.batch import Batch, TrainImages
from lora_dist.data.loader import batches, train_loader
from lora_dist.data.order import FILLER, Order
from lora_dist.engines.engine import Engine, share_statistics
from lora_dist.errors import PreemptedError, ProcessError, TrainingStoppedError
from lora_dist.model.base import set_training
from lora_dist.processes.preemption import Preemption, StopRequested
from lora_dist.training.evaluation import Evaluation, Evaluator, NothingToEvaluateError
from lora_dist.training.report import show_evaluation
from lora_dist.training.schedule import Schedule, is_due
from lora_dist.training.state import Checkpointer, Progress
from lora_dist.training.step import NonFiniteLossError, Update, train_step
from lora_dist.training.tracking import Tracker, Window, peak_memory_mb

MOST_SKIPPED = 32
"""Updates in a row that fp16 loss scaling may leave out; each of them halves the scale, from 65,536."""


MOST_BLIND = 32
"""Updates in a row of which no image can be read, in epochs that are longer."""


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
        preemption: stops or saves it when asked from outside.
        tracker: shows it.
        on_best: called on every process after an evaluation that is the best so far, once it has been saved.
    """

    settings: Settings
    engine: Engine
    images: TrainImages
    order: Order
    schedule: Schedule
    evaluator: Evaluator
    checkpointer: Checkpointer
    preemption: Preemption
    tracker: Tracker
    on_best: Callable[["Job", Progress, Evaluation], None]


@contextmanager
def stopped_on_request(job: Job, progress: Progress) -> Iterator[None]:
    """Takes signals as requests to stop, from the first update until the result has been written.

    Raises:
        TrainingStoppedError: a stop was asked for, and the state could not be saved.
        PreemptedError: a stop was asked for; the state has been saved.
    """
    try:
        with job.preemption.listening():
            yield
    except StopRequested:
        job.engine.accelerator.end_training()
        saved = job.checkpointer.saved_step
        if saved != progress.step:
            raise TrainingStoppedError(
                f"told to stop after update {progress.step} of {job.schedule.total_steps}, which could not be saved. "
                + ("Nothing was." if saved is None else f"--resume_from_checkpoint auto goes on from update {saved}.")
            ) from None
        raise PreemptedError(
            f"after update {progress.step} of {job.schedule.total_steps}, which is saved. "
            f"--resume_from_checkpoint auto goes on from there."
        ) from None
    finally:
        job.tracker.flush()


def fit(job: Job, progress: Progress) -> None:
    """Trains from where `progress` stands to the end of the schedule, or until it stops getting better.

    Called on every process. Changes `progress` as it goes. The state at the end is saved.

    Raises:
        TrainingStoppedError: the loss is not finite, and the last good state has been saved; or no image can be read.
        StopRequested: a stop was asked for, and the state saved if that could be.
    """
    window = Window()
    stream = window.timed(batches(_loader(job, progress.step), job.engine.accelerator.device))
    if progress.settled_step < progress.step:
        _settle(job, progress, window, save=True)
    set_training(job.engine.model)
    while not _is_over(job, progress):
        _update(job, progress, window, stream)
        if progress.step % job.settings.run.logging_steps == 0:
            _log_training(job, progress, window)
        asked = _check(job, progress)
        _settle(job, progress, window, save=asked)
        if asked:
            job.preemption.saved()
    share_statistics(job.engine)


def make_update(job: Job, step: int, stream: Iterator[Batch]) -> Update:
    """Makes update `step` (from 0) with the next batches of `stream`. Called on every process.

    Raises:
        NonFiniteLossError: before the update is made.
        ProcessError: the device has no memory left.
    """
    count = job.order.micro_batches_in(step)
    try:
        return train_step(
            job.engine,
            islice(stream, count),
            micro_batch_count=count,
            sample_count=job.order.samples_in(step),
            learning_rate=job.schedule.learning_rate(step),
            max_grad_norm=job.settings.optimization.max_grad_norm,
            label_smoothing=job.settings.augmentation.label_smoothing_factor,
            dropout_seed=(job.settings.run.seed, step),
        )
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            raise ProcessError(
                f"out of memory in update {step + 1}: {error}\nGo on with --resume_from_checkpoint auto and "
                f"--auto_batch_size, which finds a batch that fits; or with --gradient_checkpointing."
            ) from error
        raise


def _update(job: Job, progress: Progress, window: Window, stream: Iterator[Batch]) -> None:
    """Makes the next update."""
    order, step = job.order, progress.step
    window.start_update()
    try:
        update = make_update(job, step, stream)
    except NonFiniteLossError as error:
        _leave_out(job, progress, error)
        unreadable = error.unreadable
    else:
        progress.note_update(update.loss, update.grad_norm, update.skipped)
        unreadable = update.unreadable
        if progress.skipped_in_a_row > MOST_SKIPPED:
            _save(job, progress)
            raise TrainingStoppedError(
                f"fp16 loss scaling has left out {progress.skipped_in_a_row} updates in a row: the gradient is not "
                f"finite at any scale. Use bf16 or fp32 (--mixed_precision), or a lower --learning_rate."
            )
    progress.unreadable_images += unreadable
    progress.train_seconds += window.end_update(order.samples_in(step))
    progress.samples += order.samples_in(step)
    progress.step += 1
    progress.blind_updates = progress.blind_updates + 1 if unreadable == order.samples_in(step) else 0
    if progress.blind_updates >= min(MOST_BLIND, order.steps_per_epoch, job.schedule.total_steps):
        raise TrainingStoppedError(
            f"none of the images of the last {progress.blind_updates} updates can be read, up to update "
            f"{progress.step}; their names and what is wrong with them are above.{_way_on(job)}"
        )
    job.tracker.advance(progress.step, progress.mean_loss, window.samples_per_second)


def _way_on(job: Job) -> str:
    """Words on where a run that was ended can go on."""
    saved = job.checkpointer.saved_step
    return "" if saved is None else f" --resume_from_checkpoint auto goes on from update {saved}."


def _leave_out(job: Job, progress: Progress, error: NonFiniteLossError) -> None:
    """Goes on without an update that is not finite, if that can be done and is not the last one allowed.

    Raises:
        TrainingStoppedError: otherwise; the last good state has been saved.
    """
    engine, limit = job.engine, job.settings.optimization.max_nonfinite_updates
    names = sorted(set(gather_object([job.images.split.name(row) for row in error.indices if row != FILLER])))
    shown = "\n  ".join(names[:8] + ([f"… and {len(names) - 8} more"] if len(names) > 8 else []))
    what = f"the {error.what} of update {progress.step + 1} is not finite"
    # A batch that is not finite spoils the statistics of batch norms that train.
    intact = all(tensor.isfinite().all() for tensor in engine.trained().values())
    if engine.drop_update() and all(gather_object([intact])) and progress.skipped_in_a_row + 1 < limit:
        progress.skipped_updates += 1
        progress.skipped_in_a_row += 1
        job.tracker.say(f"{what}: left out. Samples:\n  {shown}")
        return
    _save(job, progress)
    raise TrainingStoppedError(
        f"{what}. The update was not made; --resume_from_checkpoint auto goes on from before it. "
        f"A lower --learning_rate, --max_grad_norm or a warm-up may help. Samples:\n  {shown}"
    ) from error


def _settle(job: Job, progress: Progress, window: Window, save: bool) -> None:
    """Evaluates and saves where that is due after an update; saves as well if told so.

    A checkpoint holds what has been logged of its update, so that what goes on from it logs nothing twice.
    """
    run = job.settings.run

    def due(every: Any) -> bool:
        return is_due(every, progress.step, job.order.steps_per_epoch, job.schedule.total_steps)

    best = None
    if due(run.eval_steps):
        best = _evaluate(job, progress)
        set_training(job.engine.model)
    if _is_over(job, progress) and progress.logged_step < progress.step:
        _log_training(job, progress, window)
    progress.settled_step = progress.step
    if save or best or due(run.checkpointing_steps) or _is_over(job, progress):
        _save(job, progress)
    if best:
        job.on_best(job, progress, best)


def _check(job: Job, progress: Progress) -> bool:
    """Whether a checkpoint is asked for; where a stop is, saves and passes that on."""
    try:
        return job.preemption.check()
    except StopRequested:
        _save(job, progress)
        raise


def _save(job: Job, progress: Progress) -> None:
    job.tracker.flush()
    job.checkpointer.save(progress)


def _loader(job: Job, first_step: int) -> DataLoader:
    device = job.engine.accelerator.device
    return train_loader(job.images, job.order, first_step, job.schedule.total_steps, job.settings.data, device)


def _is_over(job: Job, progress: Progress) -> bool:
    patience = job.settings.optimization.early_stopping_patience
    exhausted = patience is not None and progress.stale_evaluations >= patience
    return exhausted or progress.step >= job.schedule.total_steps


def _epoch(job: Job, step: int) -> float:
    return job.order.samples_before(step) / job.order.num_samples


def _log_training(job: Job, progress: Progress, window: Window) -> None:
    step = progress.step
    values = {
        "train/loss": progress.mean_loss,
        "train/learning_rate": job.schedule.learning_rate(step - 1),
        "train/grad_norm": progress.grad_norm,
        "train/samples_per_second": window.samples_per_second,
        "train/data_wait": min(1.0, window.waited / max(window.seconds, 1e-9)),
        "train/peak_memory_mb": peak_memory_mb(job.engine.accelerator.device),
        "train/skipped_updates": float(progress.skipped_updates),
        "train/unreadable_images": float(progress.unreadable_images),
    }
    job.tracker.scalars(step, _epoch(job, step), values)
    left = (job.schedule.total_steps - step) * window.seconds / max(1, window.updates)
    job.tracker.progress_line(step, _epoch(job, step), values, left)
    progress.note_log()
    window.reset()


def _evaluate(job: Job, progress: Progress) -> Evaluation | None:
    """Evaluates, logs and notes the result; returns it where it is the best so far.

    Raises:
        TrainingStoppedError: no image can be read, and what was trained has been saved.
    """
    share_statistics(job.engine)
    try:
        evaluation = job.evaluator(after_batch=lambda: _check(job, progress))
    except NothingToEvaluateError as error:
        # All processes know of it, so they can save together.
        _save(job, progress)
        raise TrainingStoppedError(f"{error}.{_way_on(job)}") from error
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
    return evaluation if best else None
