"""Ends a training run early: saves its state, and raises an error that says how to resume."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size

from lora_dist.errors import PreemptedError, ProcessError, TrainingStoppedError, UserError
from lora_dist.processes.failure import RankFailedError
from lora_dist.processes.preemption import StopRequested
from lora_dist.training.run import TrainingRun
from lora_dist.training.step import BrokenUpdateError, LostBatchError

logger = logging.getLogger(__name__)


@contextmanager
def stopped_on_request(run: TrainingRun) -> Iterator[None]:
    """Takes signals as requests to stop, from the first update until the result has been written.

    Raises:
        TrainingStoppedError: a stop was requested, and the state could not be saved.
        PreemptedError: a stop was requested; the state has been saved.
    """
    try:
        with run.preemption.listening():
            yield
    except StopRequested:
        run.engine.accelerator.end_training()
        stopped_after = f"after update {run.progress.step} of {run.schedule.total_steps}"
        if run.checkpointer.saved_step != run.progress.step:
            raise TrainingStoppedError(
                f"asked to stop {stopped_after}, which could not be saved. "
                + (run.resume_hint or "There is no checkpoint.")
            ) from None
        raise PreemptedError(f"{stopped_after}, which is saved. {run.resume_hint}") from None
    finally:
        run.tracker.flush()


@contextmanager
def resume_hint_added(run: TrainingRun) -> Iterator[None]:
    """Adds to an error the update from which the run can be resumed, if the error does not say it."""
    try:
        yield
    except (TrainingStoppedError, PreemptedError):
        raise
    except Exception as error:
        _add_resume_hint(error, run)
        raise


@contextmanager
def saved_on_failure(run: TrainingRun) -> Iterator[None]:
    """Saves the state before an error ends the run, if the state is intact.

    Several processes can save together only where all of them know of the error, as of a `LostBatchError`.
    """
    try:
        yield
    except (StopRequested, TrainingStoppedError):
        raise
    except Exception as error:
        known_to_all = isinstance(error, LostBatchError) or run.engine.accelerator.num_processes == 1
        is_saved = run.checkpointer.saved_step == run.progress.step or not run.progress.step
        in_doubt = any(isinstance(one, BrokenUpdateError) for one in (error, error.__cause__))
        if known_to_all and not is_saved and not in_doubt:
            with suppress(RuntimeError):  # a device that has failed cannot be read
                run.engine.drop_update()
                run.save()
        if isinstance(error, LostBatchError):
            raise data_failure(error) from error
        raise


@contextmanager
def update_explained(step: int) -> Iterator[None]:
    """Adds the settings to change to an error of update `step` (from 0) about memory or --deterministic."""
    try:
        yield
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            raise ProcessError(
                f"out of memory in update {step + 1}: {error}\nResume with --resume_from_checkpoint auto and either "
                f"--auto_batch_size, which finds a batch size that fits, or --gradient_checkpointing."
            ) from error
        if "use_deterministic_algorithms" in str(error):
            reason = str(error).partition(",")[0]
            raise UserError(
                f"--deterministic: update {step + 1} cannot be made: {reason}. Train without it."
            ) from error
        raise


def data_failure(lost: LostBatchError) -> Exception:
    """Returns the original error on the process whose data failed, and a `RankFailedError` on the others.

    Must be called on every process.
    """
    own = lost.own
    code = own.exit_code if isinstance(own, UserError) else 1
    failures = gather_object([None if own is None else (f"{type(own).__name__}: {own}", code)])
    if own is not None:
        return own
    rank, (message, code) = next((rank, failure) for rank, failure in enumerate(failures) if failure is not None)
    return RankFailedError(f"rank {rank} could not load its data: {message}", code)


def _add_resume_hint(error: Exception, run: TrainingRun) -> None:
    """Adds the update to resume from to a `UserError`; logs it for any other error."""
    step = run.progress.step
    if not step:
        return
    if run.checkpointer.saved_step == step:
        hint = f"All updates are saved: {run.resume_hint}"
    else:
        hint = f"Update {step} is not saved. {run.resume_hint or 'There is no checkpoint.'}"
    if isinstance(error, UserError):
        sentence = str(error)
        error.args = (f"{sentence}{'' if sentence.endswith('.') else '.'} {hint}",)
    else:
        logger.error("%s: %s. %s", type(error).__name__, error, hint)
