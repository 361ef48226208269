"""The training loop: updates, logs, evaluations and saves in the order in which they happen."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import count

import torch
from accelerate.utils import gather_object

from lora_dist.data.batch import Batch
from lora_dist.data.sampling.order import PADDING_INDEX
from lora_dist.engines.engine import broadcast_statistics
from lora_dist.errors import TrainingStoppedError
from lora_dist.model.lora.trainable import set_training
from lora_dist.processes.preemption import StopRequested
from lora_dist.training.evaluation import NothingToEvaluateError
from lora_dist.training.failures import saved_on_failure, update_explained
from lora_dist.training.problems.problem_types import EvaluationResult
from lora_dist.training.reporting.report import show_evaluation
from lora_dist.training.reporting.throughput import ThroughputMeter, peak_memory_mb
from lora_dist.training.run import TrainingRun
from lora_dist.training.step import Update

MAX_CONSECUTIVE_SKIPPED = 32
"""Consecutive updates that fp16 loss scaling may skip; each of them halves the scale, from 65,536."""
MAX_CONSECUTIVE_UNREADABLE = 32
"""Consecutive updates without a readable image after which training stops; fewer if an epoch is shorter."""

PushBest = Callable[[TrainingRun, EvaluationResult], None]


def training_loop(run: TrainingRun, push_best: PushBest) -> None:
    """Trains from `run.progress` to the end of the schedule, or until early stopping. Saves the final state.

    Must be called on every process.

    Args:
        push_best: called after each evaluation that is the best so far, once a checkpoint of it is saved.

    Raises:
        TrainingStoppedError: too many updates were not finite, fp16 loss scaling skips all of them, or no image can be
            read; the message says from where to resume.
        StopRequested: a stop was requested; the state has been saved if possible.
        RankFailedError: another process could not load its data; the state has been saved.
        Exception: any other error; the state has been saved if possible.
    """
    progress = run.progress
    meter = ThroughputMeter()
    max_grad_norm = run.settings.optimization.max_grad_norm
    with (
        closing(run.stream(progress.step, run.schedule.total_steps, meter.timed)) as stream,
        saved_on_failure(run),
    ):
        _catch_up(run, meter, push_best)
        set_training(run.engine.model)
        while not run.is_over():
            step = progress.step
            meter.start_update()
            with update_explained(step):
                gradient = run.begin_update(step, before_exchange=lambda: _note_wait_for_others(run, meter))
                for batch in gradient.loaded(_with_activity(run, step, stream)):
                    gradient.backward(batch)
                update = gradient.step(max_grad_norm, run.preemption.requests())
                if update.nonfinite:
                    _skip_or_stop(run, update)
                elif run.average is not None:
                    run.average.update(step)
            _count(run, meter, update)
            _stop_without_progress(run)
            if progress.step % run.settings.run.logging_steps == 0:
                _log(run, meter)
            save_requested = _check_requests(run, update.requests)
            _evaluate_and_save(run, meter, push_best, save_requested)
            if save_requested:
                run.preemption.clear_save_request()
        broadcast_statistics(run.engine)


def _catch_up(run: TrainingRun, meter: ThroughputMeter, push_best: PushBest) -> None:
    """Saves, logs and evaluates after the update that the run resumes from, if the stopped run did not get to it."""
    progress = run.progress
    if progress.step and run.checkpointer.saved_step is None:
        run.save()  # the checkpoint is in another directory
    if progress.logged_step < progress.step and progress.step % run.settings.run.logging_steps == 0:
        _log(run, meter)
    if progress.last_evaluated_step < progress.step:
        _evaluate_and_save(run, meter, push_best, save=True)


def _with_activity(run: TrainingRun, step: int, stream: Iterator[Batch]) -> Iterator[Batch]:
    """Yields the micro-batches of an update and reports each activity to the watch."""
    for number in count(1):
        run.watch.enter(f"update {step + 1}: waiting for micro-batch {number}")
        try:
            batch = next(stream)
        except StopIteration:
            return
        run.watch.enter(f"update {step + 1}: computing micro-batch {number}")
        yield batch


def _note_wait_for_others(run: TrainingRun, meter: ThroughputMeter) -> None:
    run.watch.enter(f"update {run.progress.step + 1}: last backward pass, which waits for the other processes")
    meter.note_own_work()


def _skip_or_stop(run: TrainingRun, update: Update) -> None:
    """Skips an update that is not finite, or stops after `max_nonfinite_updates` in a row or if it cannot be skipped.

    Raises:
        TrainingStoppedError: the message says from where to resume.
    """
    indices = gather_object([index for index in update.suspects if index != PADDING_INDEX])
    names = sorted({run.images.split.name(index) for index in indices})
    shown = "\n  ".join(names[:8] + ([f"… and {len(names) - 8} more"] if len(names) > 8 else []))
    what = f"the {update.nonfinite} of update {run.progress.step + 1} is not finite"
    dropped = run.engine.drop_update()
    if dropped and run.progress.consecutive_nonfinite + 1 < run.settings.optimization.max_nonfinite_updates:
        run.tracker.say(f"{what}: update skipped. Samples:\n  {shown}")
        return
    run.save()
    fp16 = run.engine.accelerator.mixed_precision == "fp16"
    raise TrainingStoppedError(
        f"{what}. {run.resume_hint} "
        f"{'Activations may exceed the range of fp16: use --mixed_precision bf16 or no. ' if fp16 else ''}"
        f"Try a lower --learning_rate or --max_grad_norm, or add --warmup_steps. Samples:\n  {shown}"
    )


def _count(run: TrainingRun, meter: ThroughputMeter, update: Update) -> None:
    """Adds an update to the counters and to the progress bar."""
    progress = run.progress
    samples = run.plan.samples_in(progress.step)
    progress.finish_update(update, samples, meter.end_update(samples))
    run.watch.end_warm_up()
    run.tracker.advance(progress.step, progress.mean_loss, meter.samples_per_second)


def _stop_without_progress(run: TrainingRun) -> None:
    """Stops a run that learns nothing: fp16 loss scaling skips every update, or no image can be read.

    Raises:
        TrainingStoppedError: the message says from where to resume.
    """
    progress = run.progress
    if progress.consecutive_skipped > MAX_CONSECUTIVE_SKIPPED:
        run.save()
        raise TrainingStoppedError(
            f"fp16 loss scaling has skipped {progress.consecutive_skipped} consecutive updates: the gradient is not "
            f"finite at any scale. Use bf16 or fp32 (--mixed_precision), or a lower --learning_rate. "
            f"{run.resume_hint}"
        )
    if progress.consecutive_unreadable >= min(
        MAX_CONSECUTIVE_UNREADABLE, run.plan.steps_per_epoch, run.schedule.total_steps
    ):
        run.save()
        raise TrainingStoppedError(
            f"no image could be read in the last {progress.consecutive_unreadable} updates, up to update "
            f"{progress.step}; the log above names each image and its error. {run.resume_hint}"
        )


def _check_requests(run: TrainingRun, requests: Sequence[float]) -> bool:
    """Returns whether a checkpoint was requested. If a stop was requested, saves and re-raises."""
    try:
        return run.preemption.check(requests)
    except StopRequested:
        run.save()
        raise


def _evaluate_and_save(run: TrainingRun, meter: ThroughputMeter, push_best: PushBest, save: bool) -> None:
    """Evaluates, saves, and pushes a new best model if due after an update; also saves if `save` is True.

    A checkpoint records which updates have been logged, so that a resumed run logs nothing twice.
    """
    progress = run.progress
    best = None
    evaluates = run.is_due(run.settings.run.eval_steps)
    if evaluates:
        broadcast_statistics(run.engine)
        # Saved before the evaluation, which may fail. A resumed run repeats the evaluation.
        run.save()
        with run.with_result_weights():
            best = _evaluate(run)
        set_training(run.engine.model)
    if run.is_over() and progress.logged_step < progress.step:
        _log(run, meter)
    progress.last_evaluated_step = progress.step
    if save or evaluates or run.is_due(run.settings.run.checkpointing_steps) or run.is_over():
        run.save()
    if best:
        run.watch.enter("writing the best model so far, for the Hub", extra_time=True)
        push_best(run, best)


def _evaluate(run: TrainingRun) -> EvaluationResult | None:
    """Evaluates the model and logs the result; returns it if it is the best so far.

    Raises:
        TrainingStoppedError: no validation image can be read.
    """
    progress = run.progress
    try:
        evaluation = run.evaluate(f"evaluating after update {progress.step}")
    except NothingToEvaluateError as error:
        raise TrainingStoppedError(f"{error}. {run.resume_hint}") from error
    name = run.settings.optimization.metric_for_best_model
    loss = evaluation.metrics["loss"]
    best = progress.note_evaluation(evaluation.metrics[name], loss, lower_is_better=name == "loss")
    metrics = {f"eval/{metric}": value for metric, value in evaluation.metrics.items()}
    run.tracker.scalars(progress.step, run.epoch(progress.step), metrics)
    shown = "  ".join(f"{metric} {value:.4f}" for metric, value in evaluation.metrics.items())
    run.tracker.say(f"eval at step {progress.step}: {shown}{'  (best)' if best else ''}")
    show_evaluation(run.tracker, run.evaluator, evaluation, progress.step)
    if run.is_over() and progress.step < run.schedule.total_steps:
        stale = progress.stale_evaluations
        number = "the last evaluation" if stale == 1 else f"the last {stale} evaluations"
        run.tracker.say(f"stopped early: {name} has not improved in {number} (--early_stopping_patience)")
    return evaluation if best else None


def _log(run: TrainingRun, meter: ThroughputMeter) -> None:
    progress, device = run.progress, run.engine.accelerator.device
    step = progress.step
    values = {
        "train/loss": progress.mean_loss,
        "train/learning_rate": run.schedule.learning_rate(step - 1),
        "train/grad_norm": progress.grad_norm,
        "train/peak_memory_mb": peak_memory_mb(device),
        "train/skipped_updates": float(progress.skipped_updates),
        "train/unreadable_images": float(progress.unreadable_images),
    }
    # Right after a resume, no update has been measured yet.
    if meter.updates:
        values |= _speed(run, meter)
        left = 0 if run.is_over() else (run.schedule.total_steps - step) * meter.seconds / meter.updates
        run.tracker.progress_line(step, run.epoch(step), values, left)
    run.tracker.scalars(step, run.epoch(step), values)
    progress.note_log()
    meter.reset()


def _speed(run: TrainingRun, meter: ThroughputMeter) -> dict[str, float]:
    """Returns the speed since the last log. Call it on every process.

    The step times are the mean and the maximum over processes of the time per update before waiting for the others.
    """
    accelerator = run.engine.accelerator
    times = accelerator.gather(torch.tensor([meter.own_seconds / meter.updates], device=accelerator.device))
    return {
        "train/samples_per_second": meter.samples_per_second,
        "train/step_time": float(times.mean()),
        "train/step_time_slowest_rank": float(times.max()),
        "train/data_wait": min(1.0, meter.waited / max(meter.seconds, 1e-9)),
    }
