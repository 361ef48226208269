"""Real sweeps on two local workers: what is left at the end, and what happens when one is stopped or killed."""

import csv
import signal
from pathlib import Path

import optuna
import psutil
import pytest
from lora_dist_testing.launching import Launch, results_of, run, run_flags, started
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lora_dist.sweep.study import JOURNAL, NAME

SWEEP = "lora_dist.sweep"
SEARCH = ("--search", "learning_rate=log:1e-4..1e-1", "lora_r=4,8")


def _arguments(vit: Path, photos: Path, out: Path, **settings: object) -> list[object]:
    return [*run_flags(vit, photos, out, **{"num_train_epochs": 3, "workers": 2} | settings), *SEARCH]


def _trainings(launch: Launch) -> list[psutil.Process]:
    return [one for one in launch.processes() if "lora_dist.train" in one.cmdline()]


def _rows(out: Path) -> list[dict[str, str]]:
    """The trials in the order of their numbers, without measured times."""
    with (out / "trials.csv").open(encoding="utf-8", newline="") as file:
        rows = [{name: value for name, value in row.items() if name != "train_runtime"} for row in csv.DictReader(file)]
    return sorted(rows, key=lambda row: int(row["trial"]))


def test_two_workers_train_and_leave_a_table_a_picture_and_the_best_settings(
    vit: Path, photos: Path, tmp_path: Path
) -> None:
    """Meanwhile, a second sweep in the same directory is refused; afterwards, the same command trains nothing."""
    out = tmp_path / "sweep"
    arguments = _arguments(vit, photos, out, trials=2)
    with started(tmp_path / "log", *arguments, module=SWEEP) as launch:
        launch.wait_for(lambda: len(_trainings(launch)) == 2)
        second = run(SWEEP, *arguments, code=2)
        assert "is in use by another run" in second.stderr
        assert "stop it and repeat this command" in second.stderr
        assert launch.wait() == 0
    rows = _rows(out)
    assert [row["ended"] for row in rows] == ["complete", "complete"]
    for row in rows:
        trial = out / f"trial-{int(row['trial']):04d}"
        assert float(row["accuracy"]) == results_of(trial)["eval_accuracy"]
        assert row["evaluations"] == "3"
        assert (trial / "adapter" / "adapter_model.safetensors").is_file()
        assert not (trial / "checkpoints").exists()
    assert {"best.yaml", "sweep.png", "settings.yaml", "trials.csv", JOURNAL} <= {path.name for path in out.iterdir()}
    logs = [(path, path.read_bytes()) for path in out.glob("trial-*/log.txt")]
    again = run(SWEEP, *arguments)
    assert [(path, path.read_bytes()) for path in out.glob("trial-*/log.txt")] == logs
    assert again.stdout.strip() in launch.text


@pytest.mark.slow
def test_a_sweep_that_is_stopped_and_killed_ends_as_one_that_was_left_alone(
    vit: Path, photos: Path, tmp_path: Path
) -> None:
    """With values that do not depend on which trial ends first: those of the first ten are random."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings: dict[str, object] = {"trials": 4, "num_train_epochs": 20}
    run(SWEEP, *_arguments(vit, photos, whole, **settings))
    arguments = _arguments(vit, photos, broken, **settings)
    with started(tmp_path / "stopped", *arguments, module=SWEEP) as launch:
        launch.wait_for(lambda: (broken / "trial-0000" / "checkpoints").exists())
        launch.process.send_signal(signal.SIGINT)
        assert launch.wait() == 75
    assert "SIGINT: the trials save and stop" in launch.text
    assert "stopped: 0 of 4 trials have ended. The same command continues the sweep" in launch.text
    assert "Traceback" not in launch.text
    with started(tmp_path / "killed", *arguments, module=SWEEP) as launch:
        launch.wait_for(lambda: (broken / "trial-0002" / "metrics.jsonl").exists())
        launch.process.kill()
        assert launch.wait(20) == -signal.SIGKILL
    run(SWEEP, *arguments)
    assert _rows(broken) == _rows(whole)
    assert "resuming from" in (broken / "trial-0000" / "log.txt").read_text(encoding="utf-8")
    study = optuna.load_study(study_name=NAME, storage=JournalStorage(JournalFileBackend(str(broken / JOURNAL))))
    assert len(study.trials) == 4


@pytest.mark.slow
def test_trials_that_are_worse_are_pruned_and_those_that_crash_are_failed(
    vit: Path, photos: Path, tmp_path: Path
) -> None:
    """A trial that is killed alone, as by the kernel for want of memory, is not repeated."""
    out = tmp_path / "sweep"
    # The random values of the first ten trials: with this seed, trial 8 is the only one with a rate of almost 0.
    arguments = [*run_flags(vit, photos, out, trials=9, num_train_epochs=60, seed=17, workers=2)]
    arguments += ["--search", "learning_rate=5e-3,1e-9"]
    with started(tmp_path / "log", *arguments, module=SWEEP) as launch:
        launch.wait_for(lambda: (out / "trial-0001" / "metrics.jsonl").exists())
        next(one for one in _trainings(launch) if "trial-0001" in " ".join(one.cmdline())).kill()
        assert launch.wait(600) == 0
    rows = _rows(out)
    assert (rows[1]["ended"], rows[1]["reason"]) == ("failed", "killed by SIGKILL")
    assert rows[8]["ended"] == "pruned"
    assert int(rows[8]["evaluations"]) < 60
    assert {row["ended"] for row in (rows[0], *rows[2:8])} == {"complete"}
    assert not list(out.glob("trial-*/checkpoints"))
    assert "trial 8: pruned, with accuracy" in launch.text
