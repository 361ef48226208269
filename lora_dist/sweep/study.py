"""A sweep: its settings, and the study of Optuna in a file, from which the same command continues."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import MedianPruner, NopPruner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from lora_dist.errors import UserError
from lora_dist.processes.run_lock import LOCK
from lora_dist.settings.sweep import Axis, SweepSettings, as_given, axes_of, given_settings, searched

JOURNAL, NAME = "study.journal", "sweep"
REASON, SECONDS = "reason", "train_runtime"
"""Attributes of a trial: the reason of its failure, and its seconds of training."""
_RECORD = "settings"
_PRUNERS = {"median": MedianPruner(n_startup_trials=5, n_warmup_steps=1), "none": NopPruner()}


@dataclass(frozen=True)
class Sweep:
    """A sweep in a directory whose lock is held.

    Attributes:
        settings: of the sweep and of its runs.
        axes: the settings to search.
        metric: the validation metric to optimize.
    """

    root: Path
    settings: SweepSettings
    axes: list[Axis]
    metric: str
    study: optuna.Study

    def output_of(self, number: int) -> Path:
        """The directory of the run of a trial."""
        return self.root / f"trial-{number:04d}"

    def ended(self) -> list[FrozenTrial]:
        """The trials that are complete, pruned or failed."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]

    def best_first(self) -> list[FrozenTrial]:
        """The trials that are complete; the best one first, and of equal ones the earlier one."""
        sign = 1 if self.study.direction == StudyDirection.MINIMIZE else -1
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return sorted(complete, key=lambda trial: sign * trial.values[0])

    def unfinished(self) -> list[Trial]:
        """The trials that ran when an earlier command was stopped or killed."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [Trial(self.study, trial._trial_id) for trial in running]

    def ask(self) -> Trial:
        """Returns a new trial. Its values depend on --seed, its number and the results of the other trials."""
        begun = [one for one in self.study.get_trials(deepcopy=False) if one.state != TrialState.WAITING]
        self._seed(len(begun))
        return self.study.ask()

    def _seed(self, number: int) -> None:
        """Gives each trial a generator of its own: one for all would repeat its values when a sweep continues."""
        seed = int(np.random.SeedSequence([self.settings.run.seed, number]).generate_state(1)[0])
        with warnings.catch_warnings():
            # Optuna 4 calls both options experimental; with Optuna 5 they are the default.
            warnings.simplefilter("ignore", ExperimentalWarning)
            self.study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)

    def values_of(self, trial: Trial) -> dict[str, Any]:
        """The values of a trial by flat name: those that it has, or else new ones."""
        return {axis.name: _value(trial, axis) for axis in self.axes}


def open_sweep(root: Path, settings: SweepSettings) -> Sweep:
    """Opens the sweep in a directory whose lock is held, or begins one.

    The first trial of a new sweep has the settings as given, if they are in the ranges.

    Raises:
        UserError: the sweep has other settings, or the directory has other files.
    """
    journal = root / JOURNAL
    if not journal.exists() and any(entry.name != LOCK for entry in root.iterdir()):
        raise UserError(f"--output_dir {root} is not empty and holds no sweep: choose another directory")
    _mend(journal)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    axes, metric = axes_of(settings), settings.with_default_metric().optimization.metric_for_best_model
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        study_name=NAME,
        direction="minimize" if metric == "loss" else "maximize",
        pruner=_PRUNERS[settings.sweep.pruner],
        load_if_exists=True,
    )
    record = {**given_settings(settings), "search": searched(settings), "pruner": settings.sweep.pruner}
    before = study.user_attrs.get(_RECORD)
    if before is None:
        if (values := as_given(settings, axes)) is not None:
            study.enqueue_trial(values, skip_if_exists=True)
        study.set_user_attr(_RECORD, record)
    elif before != record:
        raise UserError(
            f"--output_dir {root} holds a sweep with other settings: {_differences(before, record)}. Repeat the "
            f"command that began it (only --trials and --workers may differ), or choose another directory"
        )
    return Sweep(root, settings, axes, metric, study)


def ended_as(trial: FrozenTrial) -> str:
    """Returns the state of a trial that has ended, in one word."""
    return {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}[trial.state]


def _value(trial: Trial, axis: Axis) -> Any:
    if axis.choices:
        return trial.suggest_categorical(axis.name, axis.choices)
    if isinstance(axis.low, int):
        return trial.suggest_int(axis.name, axis.low, int(axis.high), log=axis.log)
    return trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log)


def _mend(journal: Path) -> None:
    """Removes the remains of a killed command: its lock, and an incomplete last line, which Optuna cannot read."""
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
    if journal.exists():
        content = journal.read_bytes()
        if (whole := content.rfind(b"\n") + 1) < len(content):
            with journal.open("r+b") as file:
                file.truncate(whole)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"--{name} was {before.get(name)} and is now {now.get(name)}" for name in changed)
