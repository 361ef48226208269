"""The training loop: the sequence of updates, logs, evaluations and saves, and where it may be left."""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch.utils.data import DataLoader

from lora_dist.data.batch import Batch, TrainImages
from lora_dist.data.loader import batches, train_loader
from lora_dist.data.sampling.order import PADDING_INDEX, BatchPlan
from lora_dist.engines.engine import Engine, share_statistics
from lora_dist.errors import PreemptedError, ProcessError, TrainingStoppedError, UserError
from lora_dist.model.trainable import set_training
from lora_dist.processes.failure import RankFailedError
from lora_dist.processes.preemption import Preemption, StopRequested
from lora_dist.processes.watch import Watch
from lora_dist.settings.train import Settings
from lora_dist.training.evaluation import Evaluation, Evaluator, NothingToEvaluateError
from lora_dist.training.reporting.report import show_evaluation
from lora_dist.training.reporting.throughput import ThroughputMeter, peak_memory_mb
from lora_dist.training.reporting.tracking import Tracker
from lora_dist.training.saving.state import Checkpointer, Progress
from lora_dist.training.schedule import Schedule, is_due
from lora_dist.training.step import BrokenUpdateError, LostBatchError, NonFiniteLossError, Update, train_step

logger = logging.getLogger(__name__)

MAX_CONSECUTIVE_SKIPPED = 32
"""Updates in a row that fp16 loss scaling may leave out; each of them halves the scale, from 65,536."""


MAX_CONSECUTIVE_UNREADABLE = 32
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
        watch: ends it when it stalls.
        on_best: called on every process after an evaluation that is the best so far, once it has been saved.
    """

    settings: Settings
    engine: Engine
    images: TrainImages
    order: BatchPlan
    schedule: Schedule
    evaluator: Evaluator
    checkpointer: Checkpointer
    preemption: Preemption
    tracker: Tracker
    watch: Watch
    on_best: Callable[["Job", Progress, Evaluation], None]


@contextmanager
def stopped_on_request(job: Job, progress: Progress) -> Iterator[None]:
    """Takes signals as requests to stop, from the first update until the result has been written.

    Any error says where the run can go on.

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
    except TrainingStoppedError:
        raise
    except Exception as error:
        _add_resume_hint(error, job, progress)
        raise
    finally:
        job.tracker.flush()


def fit(job: Job, progress: Progress) -> None:
    """Trains from where `progress` stands to the end of the schedule, or until it stops getting better.

    Called on every process. Changes `progress` as it goes. The state at the end is saved.

    Raises:
        TrainingStoppedError: the loss is not finite, and the last good state has been saved; or no image can be read.
        StopRequested: a stop was asked for, and the state saved if that could be.
        RankFailedError: another process could not load its data; the state has been saved.
        UserError: something else went wrong; it says whether the state has been saved.
    """
    meter = ThroughputMeter()
    device = job.engine.accelerator.device
    with (
        closing(meter.timed(batches(_loader(job, progress.step), device))) as stream,
        _saved_on_failure(job, progress),
    ):
        if progress.step and job.checkpointer.saved_step is None:
            _save(job, progress)  # a checkpoint from another directory
        # An error may have come between an update and its log.
        if progress.logged_step < progress.step and progress.step % job.settings.run.logging_steps == 0:
            _log_training(job, progress, meter)
        if progress.last_evaluated_step < progress.step:
            _evaluate_and_save(job, progress, meter, save=True)
        set_training(job.engine.model)
        while not _is_over(job, progress):
            _update(job, progress, meter, stream)
            if progress.step % job.settings.run.logging_steps == 0:
                _log_training(job, progress, meter)
            asked = _check(job, progress)
            _evaluate_and_save(job, progress, meter, save=asked)
            if asked:
                job.preemption.saved()
        share_statistics(job.engine)


@contextmanager
def _saved_on_failure(job: Job, progress: Progress) -> Iterator[None]:
    """Saves what has been trained before an error ends the run, if it is intact.

    Several processes can save together only where all of them know of the error, as of a `LostBatchError`.
    """
    try:
        yield
    except (StopRequested, TrainingStoppedError):
        raise
    except Exception as error:
        known_to_all = isinstance(error, LostBatchError) or job.engine.accelerator.num_processes == 1
        is_saved = job.checkpointer.saved_step == progress.step or not progress.step
        in_doubt = any(isinstance(one, BrokenUpdateError) for one in (error, error.__cause__))
        if known_to_all and not is_saved and not in_doubt:
            with suppress(RuntimeError):  # a device that has failed cannot be read
                job.engine.drop_update()
                _save(job, progress)
        if isinstance(error, LostBatchError):
            raise data_failure(error) from error
        raise


def data_failure(lost: LostBatchError) -> Exception:
    """The error to end with where data was lost: on the process that lost it its own, on the others the news of it.

    Called on every process.
    """
    own = lost.own
    code = own.exit_code if isinstance(own, UserError) else 1
    told = gather_object([None if own is None else (f"{type(own).__name__}: {own}", code)])
    if own is not None:
        return own
    rank, (message, code) = next((rank, failure) for rank, failure in enumerate(told) if failure is not None)
    return RankFailedError(f"rank {rank} could not load its data: {message}", code)


def _add_resume_hint(error: Exception, job: Job, progress: Progress) -> None:
    """Says in the error, or in the log where it gets a traceback, where the run can go on."""
    if not progress.step:
        return
    if job.checkpointer.saved_step == progress.step:
        hint = f"All updates are saved: --resume_from_checkpoint auto goes on from update {progress.step}."
    else:
        hint = f"Update {progress.step} is not saved.{_way_on(job) or ' Nothing is.'}"
    if isinstance(error, UserError):
        sentence = str(error)
        error.args = (f"{sentence}{'' if sentence.endswith('.') else '.'} {hint}",)
    else:
        logger.error("%s: %s. %s", type(error).__name__, error, hint)


def make_update(
    job: Job, step: int, stream: Iterator[Batch], before_exchange: Callable[[], object] = lambda: None
) -> Update:
    """Makes update `step` (from 0) with the next batches of `stream`. Called on every process.

    Args:
        job: whose update it is.
        step: of the update, from 0.
        stream: of micro-batches.
        before_exchange: called before the last backward pass, in which processes wait for each other.

    Raises:
        NonFiniteLossError: before the update is made.
        LostBatchError: on every process, before the update is made, where `stream` fails on any of them.
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
            padding_batch=lambda: job.images.padding_batch(job.engine.accelerator.device),
            before_exchange=before_exchange,
        )
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            raise ProcessError(
                f"out of memory in update {step + 1}: {error}\nGo on with --resume_from_checkpoint auto and "
                f"--auto_batch_size, which finds a batch that fits; or with --gradient_checkpointing."
            ) from error
        raise


def _update(job: Job, progress: Progress, meter: ThroughputMeter, stream: Iterator[Batch]) -> None:
    """Makes the next update."""
    order, step = job.order, progress.step
    meter.start_update()
    try:
        update = make_update(job, step, _noted(job, step, stream), lambda: _exchange(job, step, meter))
    except NonFiniteLossError as error:
        _leave_out(job, progress, error)
        unreadable = error.unreadable
    else:
        progress.note_update(update.loss, update.grad_norm, update.skipped)
        unreadable = update.unreadable
        if progress.skipped_in_a_row > MAX_CONSECUTIVE_SKIPPED:
            _save(job, progress)
            raise TrainingStoppedError(
                f"fp16 loss scaling has left out {progress.skipped_in_a_row} updates in a row: the gradient is not "
                f"finite at any scale. Use bf16 or fp32 (--mixed_precision), or a lower --learning_rate."
            )
    progress.step += 1
    progress.unreadable_images += unreadable
    progress.train_seconds += meter.end_update(order.samples_in(step))
    progress.samples += order.samples_in(step)
    job.watch.warmed_up()
    progress.consecutive_unreadable = progress.consecutive_unreadable + 1 if unreadable == order.samples_in(step) else 0
    if progress.consecutive_unreadable >= min(
        MAX_CONSECUTIVE_UNREADABLE, order.steps_per_epoch, job.schedule.total_steps
    ):
        _save(job, progress)
        raise TrainingStoppedError(
            f"none of the images of the last {progress.consecutive_unreadable} updates can be read, up to update "
            f"{progress.step}; their names and what is wrong with them are above.{_way_on(job)}"
        )
    job.tracker.advance(progress.step, progress.mean_loss, meter.samples_per_second)


def _noted(job: Job, step: int, stream: Iterator[Batch]) -> Iterator[Batch]:
    """The micro-batches of an update, with the watch told what is going on."""
    for number in count(1):
        # A streamed shard is asked for again for half an hour.
        streamed = job.settings.data.streaming
        job.watch.now(f"update {step + 1}: waiting for micro-batch {number}", first=streamed)
        try:
            batch = next(stream)
        except StopIteration:
            return
        job.watch.now(f"update {step + 1}: computing micro-batch {number}")
        yield batch


def _exchange(job: Job, step: int, meter: ThroughputMeter) -> None:
    job.watch.now(f"update {step + 1}: last backward pass, which waits for the other processes")
    meter.note_own_work()


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
    names = sorted(set(gather_object([job.images.split.name(row) for row in error.indices if row != PADDING_INDEX])))
    shown = "\n  ".join(names[:8] + ([f"… and {len(names) - 8} more"] if len(names) > 8 else []))
    what = f"the {error.what} of update {progress.step + 1} is not finite"
    if engine.drop_update() and progress.skipped_in_a_row + 1 < limit:
        progress.skipped_updates += 1
        progress.skipped_in_a_row += 1
        job.tracker.say(f"{what}: left out. Samples:\n  {shown}")
        return
    _save(job, progress)
    raise TrainingStoppedError(
        f"{what}. The update was not made; --resume_from_checkpoint auto goes on from before it. "
        f"A lower --learning_rate, --max_grad_norm or a warm-up may help. Samples:\n  {shown}"
    ) from error


def _evaluate_and_save(job: Job, progress: Progress, meter: ThroughputMeter, save: bool) -> None:
    """Saves and evaluates where that is due after an update; saves as well if told so.

    A checkpoint holds what has been logged of its update, so that what goes on from it logs nothing twice.
    """
    run = job.settings.run

    def due(every: Any) -> bool:
        return is_due(every, progress.step, job.order.steps_per_epoch, job.schedule.total_steps)

    best, evaluates = None, due(run.eval_steps)
    if evaluates:
        share_statistics(job.engine)
        # An evaluation that fails must not cost what was trained. A run that goes on from here makes it again.
        _save(job, progress)
        best = _evaluate(job, progress)
        set_training(job.engine.model)
    if _is_over(job, progress) and progress.logged_step < progress.step:
        _log_training(job, progress, meter)
    progress.last_evaluated_step = progress.step
    if save or evaluates or due(run.checkpointing_steps) or _is_over(job, progress):
        _save(job, progress)
    if best:
        job.watch.now("writing the best so far, to be pushed to the Hub", first=True)
        job.on_best(job, progress, best)


def _check(job: Job, progress: Progress) -> bool:
    """Whether a checkpoint is asked for; where a stop is, saves and passes that on."""
    try:
        return job.preemption.check()
    except StopRequested:
        _save(job, progress)
        raise


def _save(job: Job, progress: Progress) -> None:
    job.watch.now(f"saving after update {progress.step}", first=True)
    job.tracker.flush()
    job.checkpointer.save(progress)
    job.watch.resume_hint = _way_on(job).strip()


def _loader(job: Job, first_step: int) -> DataLoader:
    device = job.engine.accelerator.device
    return train_loader(job.images, job.order, first_step, job.schedule.total_steps, job.settings.data, device)


def _is_over(job: Job, progress: Progress) -> bool:
    patience = job.settings.optimization.early_stopping_patience
    exhausted = patience is not None and progress.stale_evaluations >= patience
    return exhausted or progress.step >= job.schedule.total_steps


def _epoch(job: Job, step: int) -> float:
    return job.order.samples_before(step) / job.order.num_samples


def _log_training(job: Job, progress: Progress, meter: ThroughputMeter) -> None:
    step = progress.step
    values = {
        "train/loss": progress.mean_loss,
        "train/learning_rate": job.schedule.learning_rate(step - 1),
        "train/grad_norm": progress.grad_norm,
        "train/samples_per_second": meter.samples_per_second,
        **_step_times(job, meter),
        "train/data_wait": min(1.0, meter.waited / max(meter.seconds, 1e-9)),
        "train/peak_memory_mb": peak_memory_mb(job.engine.accelerator.device),
        "train/skipped_updates": float(progress.skipped_updates),
        "train/unreadable_images": float(progress.unreadable_images),
    }
    job.tracker.scalars(step, _epoch(job, step), values)
    left = (job.schedule.total_steps - step) * meter.seconds / max(1, meter.updates)
    job.tracker.progress_line(step, _epoch(job, step), values, left)
    progress.note_log()
    meter.reset()


def evaluate(job: Job, name: str, check: Callable[[], object]) -> Evaluation:
    """Evaluates the model as it is. Called on every process.

    Args:
        job: whose model it is.
        name: of this evaluation, for the watch.
        check: called on all processes after each batch; what it raises ends the evaluation.

    Raises:
        NothingToEvaluateError: no validation image can be read.
    """
    numbers = count(2)

    def after_batch() -> None:
        job.watch.now(f"{name}: batch {next(numbers)}")
        check()

    job.watch.now(f"{name}: batch 1", first=True)
    return job.evaluator(after_batch)


def _step_times(job: Job, meter: ThroughputMeter) -> dict[str, float]:
    """Seconds that a process works on an update before it waits for the others: their mean, and of the slowest one."""
    accelerator = job.engine.accelerator
    own = torch.tensor([meter.own_seconds / max(1, meter.updates)], device=accelerator.device)
    times = accelerator.gather(own)
    return {"train/step_time": float(times.mean()), "train/step_time_slowest_rank": float(times.max())}


def _evaluate(job: Job, progress: Progress) -> Evaluation | None:
    """Evaluates, logs and notes the result; returns it where it is the best so far.

    Raises:
        TrainingStoppedError: no image can be read.
    """
    try:
        evaluation = evaluate(job, f"evaluating after update {progress.step}", lambda: _check(job, progress))
    except NothingToEvaluateError as error:
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
