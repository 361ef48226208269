"""Trains the trials of a sweep on the workers of this machine."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import yaml
from optuna.trial import FrozenTrial, Trial, TrialState

from lora_dist.errors import PreemptedError, TrainingStoppedError
from lora_dist.processes.signals import SAME_REQUEST_SECONDS, STOP_SIGNALS
from lora_dist.settings.sweep import given_settings, with_alpha
from lora_dist.storage.atomic import replace_file
from lora_dist.sweep.study import REASON, SECONDS, Sweep
from lora_dist.sweep.trial_process import TrialProcess

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.3
FAILURES_AT_START = 3
"""Number of trials after which a sweep ends if all of them have failed."""
SETTINGS = "settings.yaml"
_COUNT = """
import torch
from lora_dist.processes.devices import computes_on_cpu
print(0 if computes_on_cpu() else torch.cuda.device_count())
"""


def run_trials(sweep: Sweep) -> None:
    """Trains until all trials have ended.

    Raises:
        PreemptedError: a signal has stopped the sweep.
        TrainingStoppedError: the first trials of this command have all failed.
    """
    replace_file(sweep.root / SETTINGS, yaml.safe_dump(given_settings(sweep.settings), sort_keys=False).encode())
    remove_unneeded(sweep)
    total, gpus = sweep.settings.sweep.trials, visible_gpus()
    workers = sweep.settings.sweep.workers or len(gpus) or 1
    waiting, before = deque(sweep.unfinished()), {trial.number for trial in sweep.ended()}
    running: dict[int, tuple[Trial, TrialProcess]] = {}
    with _stop_requests() as requests:
        try:
            while True:
                for worker in sorted(set(range(workers)) - running.keys()):
                    if not requests and (waiting or len(sweep.ended()) + len(running) < total):
                        trial = waiting.popleft() if waiting else sweep.ask()
                        running[worker] = trial, _start(sweep, trial, environment_of(worker, workers, gpus))
                if not running:
                    break
                time.sleep(POLL_SECONDS)
                _pass_on(requests, [process for _, process in running.values()])
                for worker in [
                    worker for worker, (trial, process) in running.items() if _has_ended(sweep, trial, process)
                ]:
                    trial, process = running.pop(worker)
                    was_stopped = requests or process.exit_code() == PreemptedError.exit_code
                    if process.exit_code() and was_stopped and not process.is_pruned:
                        waiting.append(trial)
                    else:
                        _tell(sweep, trial, process)
                        _require_a_success([one for one in sweep.ended() if one.number not in before])
        finally:
            for _, process in running.values():
                process.kill()
    if (done := len(sweep.ended())) < total:
        raise PreemptedError(f"{done} of {total} trials have ended. The same command continues the sweep")


def remove_unneeded(sweep: Sweep) -> None:
    """Removes the checkpoints of runs that have ended, and all whole models but the best."""
    best = sweep.best_first()[:1]
    for trial in sweep.ended():
        output = sweep.output_of(trial.number)
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        if trial not in best:
            shutil.rmtree(output / "model", ignore_errors=True)


def environment_of(worker: int, workers: int, gpus: Sequence[str]) -> dict[str, str]:
    """The environment of the runs of a worker: a GPU of its own where there are enough, and a share of the cores."""
    # Training processes on one machine divide its cores and its shared memory by this number.
    own = {"LOCAL_WORLD_SIZE": str(workers)}
    return os.environ | own | ({"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if gpus else {})


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    # In another process, because torch starts threads, and this one forks.
    count = int(subprocess.run([sys.executable, "-c", _COUNT], stdout=subprocess.PIPE, check=True).stdout)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if named is None else (name.strip() for name in named.split(","))
    # CUDA stops at the first name that is no GPU.
    return list(islice(names, count))


def shown(value: object) -> str:
    """A value of a trial in few digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _start(sweep: Sweep, trial: Trial, environment: dict[str, str]) -> TrialProcess:
    values = sweep.values_of(trial)
    logger.info("trial %d: %s", trial.number, ", ".join(f"{name} {shown(value)}" for name, value in values.items()))
    flags = ["--config", str(sweep.root / SETTINGS)]
    for name, value in with_alpha(sweep.settings, values).items():
        flags.append(f"--{name}={value}")
    return TrialProcess(sweep.output_of(trial.number), flags, environment)


def _has_ended(sweep: Sweep, trial: Trial, process: TrialProcess) -> bool:
    """Reports new evaluations to the study, and stops a run that the pruner rejects; returns whether it has ended."""
    has_ended = process.exit_code() is not None
    for number, value in enumerate(process.evaluations(sweep.metric)):
        if number in sweep.study.get_trials(deepcopy=False)[trial.number].intermediate_values:
            continue  # evaluations from before the sweep was stopped included
        trial.report(value, number)
        if trial.should_prune() and not has_ended:
            process.prune()
    return has_ended


def _tell(sweep: Sweep, trial: Trial, process: TrialProcess) -> None:
    """Reports the end of a run to the study."""
    code = process.exit_code()
    value = None
    if code == 0:
        results = process.result()
        value = results[f"eval_{sweep.metric}"]
        trial.set_user_attr(SECONDS, results["train_runtime"])
    if value is not None:
        sweep.study.tell(trial, value)
        best = sweep.best_first()[0]
        of_best = "the best so far" if best.number == trial.number else f"trial {best.number} has {shown(best.value)}"
        logger.info("trial %d: %s %s (%s)", trial.number, sweep.metric, shown(value), of_best)
    elif code and process.is_pruned:
        told = sweep.study.tell(trial, state=TrialState.PRUNED)
        logger.info("trial %d: pruned, with %s %s", trial.number, sweep.metric, shown(told.value))
    else:
        reason = process.failure() if code else f"{sweep.metric} is not finite"
        trial.set_user_attr(REASON, reason)
        sweep.study.tell(trial, state=TrialState.FAIL)
        logger.warning("trial %d failed: %s", trial.number, reason)
    remove_unneeded(sweep)


def _require_a_success(trials: Sequence[FrozenTrial]) -> None:
    if len(trials) >= FAILURES_AT_START and all(trial.state == TrialState.FAIL for trial in trials):
        reason = trials[-1].user_attrs[REASON]
        raise TrainingStoppedError(f"the first {len(trials)} trials have failed, the last one: {reason}")


@contextmanager
def _stop_requests() -> Iterator[list[float]]:
    """Yields a list that gets the time of each stop signal."""
    times: list[float] = []

    def note(number: int, _: object) -> None:
        if not times:
            logger.warning("%s: the trials save and stop; a second signal kills them", signal.Signals(number).name)
        times.append(time.monotonic())

    handlers = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield times
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _pass_on(requests: Sequence[float], processes: Sequence[TrialProcess]) -> None:
    for process in processes:
        if requests:
            process.ask_to_end()
        if requests and requests[-1] - requests[0] > SAME_REQUEST_SECONDS:
            process.kill()
