"""The study of a sweep: which values its trials get, and how the same command goes on with it."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from lora_dist_testing.launching import flags
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from lora_dist.errors import UserError
from lora_dist.settings.cli import parse
from lora_dist.settings.sweep import SweepSettings, contradictions
from lora_dist.sweep.study import JOURNAL, NAME, Sweep, open_sweep

SEARCH = ("learning_rate=log:1e-4..1e-1", "lora_r=4,8", "lora_alpha=2..64")


def _open(root: Path, *search: str, **settings: object) -> Sweep:
    root.mkdir(exist_ok=True)
    words = [*flags(**{"config": "demo"} | settings), "--search", *(search or SEARCH)]
    read = parse(SweepSettings, words, prog="", description="", contradictions=contradictions)
    return open_sweep(root, read)


def _run(sweep: Sweep, count: int) -> list[dict[str, Any]]:
    """The values of the next trials, whose metric grows with the learning rate."""
    found = []
    for _ in range(count):
        trial = sweep.ask()
        found.append(sweep.values_of(trial))
        sweep.study.tell(trial, found[-1]["learning_rate"])
    return found


def test_the_values_of_a_trial_do_not_depend_on_when_the_command_was_given_again(tmp_path: Path) -> None:
    whole = _run(_open(tmp_path / "whole"), 16)
    parts = [values for _ in range(4) for values in _run(_open(tmp_path / "parts"), 4)]
    assert parts == whole
    assert len({values["learning_rate"] for values in whole}) == 16
    assert {values["lora_r"] for values in whole} == {"4", "8"}
    assert all(type(values["lora_alpha"]) is int and 2 <= values["lora_alpha"] <= 64 for values in whole)
    other = _run(_open(tmp_path / "other", seed=7), 2)
    assert other[1] != whole[1]


def test_after_random_trials_the_search_goes_where_the_metric_is_high(tmp_path: Path) -> None:
    rates = [values["learning_rate"] for values in _run(_open(tmp_path), 30)]
    assert sum(rate > 1e-2 for rate in rates[20:]) > sum(rate > 1e-2 for rate in rates[:10])


def test_the_first_trial_has_the_settings_as_given(tmp_path: Path) -> None:
    assert _run(_open(tmp_path / "in", "learning_rate=log:1e-4..1e-1"), 1) == [{"learning_rate": 8e-3}]
    assert _run(_open(tmp_path / "out", "learning_rate=log:1e-4..1e-3"), 1)[0]["learning_rate"] <= 1e-3


def test_a_trial_that_was_cut_short_keeps_its_number_and_values(tmp_path: Path) -> None:
    before = _open(tmp_path)
    trial = before.ask()
    values = before.values_of(trial)
    trial.report(0.5, 0)
    (again,) = _open(tmp_path).unfinished()
    assert (again.number, _open(tmp_path).values_of(again)) == (trial.number, values)
    sweep = _open(tmp_path)
    sweep.study.tell(again, 0.7)
    assert [(one.number, one.value, one.intermediate_values) for one in _open(tmp_path).ended()] == [(0, 0.7, {0: 0.5})]
    assert not _open(tmp_path).unfinished()


def test_the_best_is_the_earlier_of_equal_trials_and_the_lowest_loss(tmp_path: Path) -> None:
    for metric, best in (("accuracy", 1), ("loss", 0)):
        sweep = _open(tmp_path / metric, metric_for_best_model=metric)
        for value in (0.25, 0.5, 0.5):
            sweep.study.tell(sweep.ask(), value)
        sweep.study.tell(sweep.ask(), state=TrialState.FAIL)
        assert sweep.best_first()[0].number == best
        assert len(sweep.ended()) == 4


def test_other_settings_are_refused_and_more_trials_are_not(tmp_path: Path) -> None:
    _open(tmp_path, trials=3)
    _open(tmp_path, trials=5, workers=2)
    with pytest.raises(UserError, match=r"sweep with other settings: --num_train_epochs was 8.0 and is now 3.0"):
        _open(tmp_path, num_train_epochs=3)
    with pytest.raises(UserError, match=r"--search was \['learning_rate=.* and is now \['lora_r=4,8'\]"):
        _open(tmp_path, "lora_r=4,8")
    with pytest.raises(UserError, match="--pruner was median and is now none"):
        _open(tmp_path, pruner="none")


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="is not empty and holds no sweep"):
        _open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_what_a_command_that_died_while_writing_leaves_is_no_hindrance(tmp_path: Path) -> None:
    """Half a line, and the lock of the file, for which Optuna would wait half a minute."""
    _run(_open(tmp_path), 2)
    (tmp_path / f"{JOURNAL}.lock").symlink_to(JOURNAL)
    content = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(content + content.splitlines()[-1][:-5])
    _run(_open(tmp_path), 1)
    assert len(_open(tmp_path).ended()) == 3


def test_optuna_opens_the_study(tmp_path: Path) -> None:
    _run(_open(tmp_path), 2)
    study = optuna.load_study(study_name=NAME, storage=JournalStorage(JournalFileBackend(str(tmp_path / JOURNAL))))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
