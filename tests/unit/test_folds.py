"""Runs of all folds, gathered: a table, and a prediction for every image by a model that did not train on it."""

import json
import shutil
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from lora_dist_testing.launching import results_of, run_flags
from lora_dist_testing.launching import train as launched

from lora_dist import folds, train
from lora_dist.metrics.predictions import read_predictions

SITES = ("north", "south|west", "south|west")


def _flags(vit: Path, photos: Path, out: Path, fold: str) -> list[str]:
    labels = out.parent / "labels.csv"
    images = sorted((photos / "train").rglob("*.png"))
    rows = [f"{path.relative_to(photos / 'train')},{path.parent.name},{SITES[n % 3]}" for n, path in enumerate(images)]
    labels.write_text("\n".join(["path,label,site", *rows]))
    data = {"validation_dir": None, "labels_file": labels, "slice_columns": "site", "fold": fold}
    return run_flags(vit, photos, out, **data, max_train_steps=2, lora_r=4, lora_dropout=0.0)


def _run(vit: Path, photos: Path, out: Path, fold: str, *more: object) -> Path:
    train.main([*_flags(vit, photos, out, fold), *map(str, more)])
    return out


@pytest.fixture(scope="module")
def runs(vit: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("folds")
    return [_run(vit, photos, root / f"fold-{number}", f"{number}/3") for number in (1, 2, 3)]


def _gathered(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    if code:
        with pytest.raises(SystemExit) as end:
            folds.main([str(argument) for argument in arguments])
        assert end.value.code == code
    else:
        folds.main([str(argument) for argument in arguments])
    return tuple(capsys.readouterr())


def test_the_runs_of_all_folds_are_gathered(runs: list[Path], photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said, warned = _gathered(capsys, *reversed(runs))
    values = [results_of(run)["eval_accuracy"] for run in runs]
    titles = ["mean", "deviation", "fold 1", "fold 2", "fold 3"]
    numbers = [mean(values), stdev(values), *values]
    assert said.startswith("| | accuracy | balanced_accuracy | macro_f1 | loss | calibration_error |\n")
    assert all(f"| {title} | {number:.4f} | " in said for title, number in zip(titles, numbers, strict=True))
    assert max(map(len, said.splitlines()[:-1])) <= 100
    assert warned == ""
    found = read_predictions(runs[0].parent / "out_of_fold.jsonl")
    assert sorted(found.paths) == sorted(map(str, (photos / "train").rglob("*.png")))
    assert found.given == [Path(path).parent.name for path in found.paths]
    assert found.classes == ["a", "b", "c"]
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-5)
    assert [found.classes[index] for index in found.probabilities.argmax(axis=1)] == found.predicted
    right = mean(one == other for one, other in zip(found.given, found.predicted, strict=True))
    assert f"out of fold, 27 images:\n    accuracy {right:.4f}" in said


def test_results_and_card_have_the_metrics_of_each_site(runs: list[Path]) -> None:
    results = results_of(runs[0])
    sites = results["eval_slices"]["site"]
    assert list(sites) == ["north", "south|west"]
    right = sum(row["accuracy"] * row["num_samples"] for row in sites.values())
    assert right / results["eval_samples"] == pytest.approx(results["eval_accuracy"])
    card = (runs[0] / "adapter" / "README.md").read_text()
    north = sites["north"]
    assert f"| site | north | {north['accuracy']:.4f}" in card
    assert "| site | south\\|west |" in card
    assert f"| {north['num_samples']} images, fewer than 30 |" in card
    assert json.loads((runs[0] / "evaluation.json").read_text())["metrics"]["slices"]["site"] == sites


def test_runs_that_do_not_belong_together_are_refused(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = ("--output", tmp_path / "out.jsonl")
    _gathered(capsys, runs[0], runs[2], *out)
    assert "folds without a run: 2/3" in caplog.text
    shutil.copytree(runs[0], tmp_path / "again")
    assert "is a validation image of both" in _gathered(capsys, runs[0], tmp_path / "again", *out, code=2)[1]
    config = tmp_path / "again" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("seed: 42", "seed: 43"))
    assert "has seed 43 and" in _gathered(capsys, runs[1], tmp_path / "again", *out, code=2)[1]
    config.write_text(text.replace("lora_r: 4", "lora_r: 8"))
    _gathered(capsys, runs[1], tmp_path / "again", *out)
    assert "differ in --lora_r" in caplog.text
    config.write_text(text.replace("fold: 1/3", "fold: null"))
    assert "the run has no --fold" in _gathered(capsys, tmp_path / "again", *out, code=2)[1]
    assert "not the directory of a finished run" in _gathered(capsys, tmp_path, *out, code=2)[1]


def test_a_run_resumes_its_own_fold(
    runs: list[Path], vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(runs[0], out)
    resume = ("--resume_from_checkpoint", "auto", "--max_train_steps", 3)
    with pytest.raises(SystemExit):
        _run(vit, photos, out, "2/3", *resume)
    assert "fold was 1/3 and is now 2/3" in capfd.readouterr().err
    _run(vit, photos, out, "1/3", *resume)
    assert results_of(out)["step"] == 3
    assert json.loads((out / "split.json").read_text()) == json.loads((runs[0] / "split.json").read_text())


@pytest.mark.slow
def test_two_processes_write_the_predictions_of_one(runs: list[Path], vit: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    launched(*_flags(vit, photos, out, "1/3"), "--per_device_train_batch_size", 4, launch_file="ddp_cpu.yaml")
    one, two = read_predictions(runs[0]), read_predictions(out)
    assert (one.paths, one.given, one.predicted) == (two.paths, two.given, two.predicted)
    assert one.probabilities is not None
    np.testing.assert_allclose(two.probabilities, one.probabilities, atol=1e-4)
