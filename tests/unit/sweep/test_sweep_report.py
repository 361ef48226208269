"""What a sweep ends with: the table, the file of all trials, the picture and the best settings."""

import csv
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from lora_dist_testing.launching import flags
from matplotlib.axes import Axes
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from lora_dist.settings.cli import parse
from lora_dist.settings.sweep import Axis, SweepSettings, axes_of, contradictions
from lora_dist.settings.train import Settings
from lora_dist.settings.train_contradictions import contradictions as of_training
from lora_dist.sweep import plot
from lora_dist.sweep.report import report, table
from lora_dist.sweep.study import REASON, SECONDS, Sweep
from lora_dist.sweep.trials import remove_unneeded

RATE, RANK = FloatDistribution(1e-4, 1e-1, log=True), CategoricalDistribution(("4", "16"))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Four trials that are complete, one that was pruned and one that failed."""
    words = [*flags(config="demo", output_dir=tmp_path), "--search", "learning_rate=log:1e-4..1e-1", "lora_r=4,16"]
    settings = parse(SweepSettings, words, prog="", description="", contradictions=contradictions)
    study = optuna.create_study(direction="maximize")
    for number, value in enumerate((0.5, 0.9, 0.25, 0.9, 0.125, None)):
        state = {4: TrialState.PRUNED, 5: TrialState.FAIL}.get(number, TrialState.COMPLETE)
        study.add_trial(
            create_trial(
                state=state,
                value=value,
                params={"learning_rate": 1e-4 * 2**number, "lora_r": ("4", "16")[number % 2]},
                distributions={"learning_rate": RATE, "lora_r": RANK},
                intermediate_values={} if value is None else {0: value},
                user_attrs={REASON: "out of memory " * 30} if value is None else {SECONDS: 1.5},
            )
        )
    return Sweep(tmp_path, settings, axes_of(settings), "accuracy", study)


def test_the_best_comes_first_and_failures_are_told(
    sweep: Sweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert report(sweep)
    said = capsys.readouterr().out
    assert said.startswith("                           learning_\ntrial  accuracy     ended       rate  lora_r\n")
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[2:8]] == ["1", "3", "0", "2", "4", "5"]
    assert lines[2].split() == ["1", "0.9000", "complete", "0.0002", "16"]
    assert lines[7].split() == ["5", "failed", "0.0032", "16"]
    assert f"trial 5 failed: {'out of memory ' * 30}"[:176] in said
    assert f"best: trial 1, in {sweep.root / 'trial-0001'}" in said


def test_all_trials_are_in_one_file(sweep: Sweep) -> None:
    report(sweep)
    with (sweep.root / "trials.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "trial": "1",
        "accuracy": "0.9",
        "ended": "complete",
        "learning_rate": "0.0002",
        "lora_r": "16",
        "evaluations": "1",
        "train_runtime": "1.5",
        "reason": "",
    }
    assert rows[-1]["accuracy"] == ""
    assert rows[-1]["reason"].count("out of memory") == 30


def test_the_best_settings_are_a_file_for_training(sweep: Sweep) -> None:
    report(sweep)
    words = ["--config", str(sweep.root / "best.yaml"), "--output_dir", "runs/best"]
    best = parse(Settings, words, prog="", description="", contradictions=of_training)
    assert (best.optimization.learning_rate, best.lora.lora_r, best.lora.lora_alpha) == (2e-4, 16, 16)
    demo = parse(Settings, ["--config", "demo"], prog="", description="", contradictions=of_training)
    assert best.optimization.model_copy(update={"learning_rate": 8e-3}) == demo.optimization
    assert best.data == demo.data
    text = (sweep.root / "best.yaml").read_text(encoding="utf-8")
    assert text.startswith(
        "# Trial 1, the best of 6: accuracy 0.9000 in validation.\n# accelerate launch -m lora_dist."
    )
    assert "output_dir" not in yaml.safe_load(text)


def test_checkpoints_of_trials_that_have_ended_go_and_the_best_model_stays(sweep: Sweep) -> None:
    sweep.study.ask()
    for number in range(7):
        for name in ("checkpoints", "model", "adapter"):
            (sweep.output_of(number) / name).mkdir(parents=True)
    remove_unneeded(sweep)
    assert sorted(str(path.relative_to(sweep.root)) for path in sweep.root.glob("*/[cm]*")) == [
        "trial-0001/model",
        "trial-0006/checkpoints",
        "trial-0006/model",
    ]
    assert len(list(sweep.root.glob("*/adapter"))) == 7


def test_without_a_complete_trial_there_is_no_best(sweep: Sweep) -> None:
    study = optuna.create_study(direction="maximize")
    study.add_trial(sweep.study.trials[5])
    assert not report(Sweep(sweep.root, sweep.settings, sweep.axes, "accuracy", study))
    assert [path.name for path in sweep.root.iterdir()] == ["trials.csv"]


def test_a_narrow_window_gets_the_columns_in_blocks() -> None:
    header = ["trial", "accuracy", "ended", "learning_rate", "head_learning_rate", "lora_r"]
    rows = [["1", "0.9000", "complete", "0.001", "0.002", "16"], ["12", "", "failed", "0.1", "0.2", "4"]]
    assert list(table(header, rows, 80)) == [
        "                                          head_",
        "                           learning_  learning_",
        "trial  accuracy     ended       rate       rate  lora_r",
        "    1    0.9000  complete      0.001      0.002      16",
        "   12              failed        0.1        0.2       4",
        "",
    ]
    narrow = list(table(header, rows, 40))
    assert max(map(len, narrow)) <= 40
    assert [line.split()[3:] for line in narrow if line.startswith("    1")] == [["0.001"], ["0.002"], ["16"]]


def _dots(panel: Axes) -> dict[str, list[list[float]]]:
    """Places of the dots of each group."""
    return {str(dots.get_label()): np.asarray(dots.get_offsets()).tolist() for dots in panel.collections}


def test_the_picture_has_the_trials_in_each_panel_and_the_best_on_top(sweep: Sweep) -> None:
    history, rate, rank = plot.plot_sweep(sweep).axes
    complete, pruned = [0.5, 0.25, 0.9], [0.125]
    assert _dots(history) == {
        "best": [[1, 0.9]],
        "complete": [[number, value] for number, value in zip((0, 2, 3), complete, strict=True)],
        "pruned": [[4, *pruned]],
    }
    (line,) = history.lines
    assert list(line.get_ydata()) == [0.5, 0.9, 0.9, 0.9]
    assert rate.get_xscale() == "log"
    assert _dots(rate)["best"] == [[2e-4, 0.9]]
    assert [label.get_text() for label in rank.get_xticklabels()] == ["4", "16"]
    assert _dots(rank)["complete"] == [[number % 2, value] for number, value in zip((0, 2, 3), complete, strict=True)]
    for panel in (history, rate, rank):
        order = sorted(panel.collections, key=lambda dots: dots.get_zorder())
        assert [dots.get_label() for dots in order] == ["pruned", "complete", "best"]


def test_many_trials_and_settings_have_room(tmp_path: Path, sweep: Sweep) -> None:
    study = optuna.create_study(direction="minimize")
    for number in range(150):
        params = {f"setting_{axis}": float(number % (axis + 2)) for axis in range(7)}
        ranges = {name: FloatDistribution(0, 9) for name in params}
        study.add_trial(create_trial(value=1.0, params=params, distributions=ranges))
    axes = [Axis(f"setting_{axis}", low=0.0, high=9.0) for axis in range(7)]
    figure = plot.plot_sweep(Sweep(tmp_path, sweep.settings, axes, "loss", study))
    assert figure.get_size_inches().tolist() == [3 * plot.WIDTH, 4 * plot.HEIGHT]
    assert [panel.get_xlabel() for panel in figure.axes] == ["trial", *(axis.name for axis in axes)]
