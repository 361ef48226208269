"""What goes wrong in the middle of a run costs nothing that was trained: it is saved first, and goes on from there."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.launching import assert_same_run, flags, lines_of, results_of, run, run_flags, saved_in
from lora_dist_testing.tiny import make_folder, make_model

from lora_dist import train
from lora_dist.data.batch import Batch, EvaluationImages
from lora_dist.training.reporting.tracking import Tracker
from lora_dist.training.saving.checkpointer import Checkpointer

RESUME = ("--resume_from_checkpoint", "auto")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Training and validation images that a test may take away."""
    make_folder(tmp_path / "images" / "train", per_class=(11, 9, 7))
    make_folder(tmp_path / "images" / "validation", per_class=3, first=100)
    return tmp_path / "images"


def _run(model: Path, images: Path, out: Path, *more: object) -> Path:
    """Nine updates, with an evaluation after every third one, and no other checkpoint."""
    train.main(
        [
            *run_flags(model, images, out, logging_steps=1, eval_steps=3, checkpointing_steps="no", max_train_steps=9),
            *map(str, more),
        ]
    )
    return out


def _fails(
    monkeypatch: pytest.MonkeyPatch, after: int, event: Callable[[], object], arguments: tuple[Any, ...]
) -> int | str | None:
    """The exit code of a run during which something happens after an update."""
    advance = Tracker.advance

    def advanced(self: Tracker, step: int, *rest: Any) -> None:
        advance(self, step, *rest)
        if step == after:
            event()

    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "advance", advanced)
        with pytest.raises(SystemExit) as end:
            _run(*arguments)
    return end.value.code


@pytest.mark.parametrize(
    ("part", "after", "saved", "architecture", "tuning"),
    [
        ("train", 5, 5, "vit", "lora"),
        ("validation", 5, 6, "resnet", "full"),
        pytest.param("validation", 5, 6, "vit", "lora", marks=pytest.mark.slow),
        pytest.param("train", 5, 5, "resnet", "full", marks=pytest.mark.slow),
    ],
)
def test_images_that_go_away_cost_no_update(
    part: str,
    after: int,
    saved: int,
    architecture: str,
    tuning: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The run goes on to the bits of one that was left alone, running statistics of batch norms included."""
    model = make_model(tmp_path / architecture, architecture)
    away = images / "away"
    more = ("--tuning", tuning, "--learning_rate", 1e-3)
    whole = _run(model, images, tmp_path / "whole", *more)
    broken = (model, images, tmp_path / "broken", *more)
    capfd.readouterr()
    code = _fails(monkeypatch, after, lambda: (images / part).rename(away), broken)
    assert code == 2
    said = capfd.readouterr().err
    assert "cannot read an image" in said
    assert f"All updates are saved: --resume_from_checkpoint auto resumes from update {saved}." in said
    assert "Traceback" not in said
    assert saved_in(tmp_path / "broken")["step"] == saved
    away.rename(images / part)
    time.sleep(1)  # files of events of one process are read in the order of their seconds
    _run(*broken, *RESUME)
    assert_same_run(tmp_path / "broken", whole)


def test_an_error_of_the_program_saves_first_as_well(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("odd")

    whole = _run(vit, images, tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        _fails(monkeypatch, 5, fail, (vit, images, tmp_path / "broken"))
    said = capfd.readouterr().err
    assert "ZeroDivisionError: odd. All updates are saved: --resume_from_checkpoint auto resumes from update 5" in said
    assert saved_in(tmp_path / "broken")["step"] == 5
    time.sleep(1)
    _run(vit, images, tmp_path / "broken", *RESUME)
    assert_same_run(tmp_path / "broken", whole)


def test_an_image_whose_logits_overflow_is_a_missing_figure_and_a_warning(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It counts as wrong, whatever its class; the control has none."""
    finished = EvaluationImages.finished

    def overflowing(self: EvaluationImages, batch: Batch) -> Batch:
        batch = finished(self, batch)
        bright = torch.where(batch.indices == 0, torch.inf, 1.0)
        return batch._replace(pixel_values=batch.pixel_values * bright[:, None, None, None])

    control = results_of(_run(vit, images, tmp_path / "control"))
    monkeypatch.setattr(EvaluationImages, "finished", overflowing)
    out = _run(vit, images, tmp_path / "run")
    said = capfd.readouterr().err
    results = results_of(out)
    assert "the model's logits are not finite for 1 of the validation images" in said
    assert "a/100.png" in said
    assert results["eval_loss"] is results["eval_calibration_error"] is None
    assert results["eval_samples"] == control["eval_samples"] == 9
    assert results["unreadable_images"]["validation"] == 0
    assert control["eval_accuracy"] - 1 / 9 - 1e-9 <= results["eval_accuracy"] <= 8 / 9
    assert [line["eval/loss"] for line in lines_of(out) if "eval/accuracy" in line] == [None] * 3
    report = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert report["metrics"]["loss"] is None
    assert sum(map(sum, report["confusion_matrix"]["rows_true_columns_predicted"])) == 8
    assert "nan" not in (out / "adapter" / "README.md").read_text(encoding="utf-8")


def test_a_model_without_any_finite_logits_is_written_all_the_same(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No image is right then, and none shows whether the adapter reads back."""
    finished = EvaluationImages.finished
    monkeypatch.setattr(
        EvaluationImages,
        "finished",
        lambda self, batch: (done := finished(self, batch))._replace(pixel_values=done.pixel_values * torch.inf),
    )
    out = _run(vit, images, tmp_path / "run")
    results = results_of(out)
    assert (results["eval_accuracy"], results["eval_balanced_accuracy"], results["eval_loss"]) == (0, 0, None)
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert "is not checked: no validation image has finite logits" in capfd.readouterr().err


def test_a_picture_that_cannot_be_made_is_a_missing_picture(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The worst images are read again to be shown, and are not there just then."""
    away = images / "away"
    scalars, save = Tracker.scalars, Checkpointer.save

    def evaluated(self: Tracker, step: int, epoch: float, values: Any) -> None:
        scalars(self, step, epoch, values)
        if "eval/accuracy" in values and step == 3:
            (images / "validation").rename(away)

    def saved(self: Checkpointer, progress: Any) -> None:
        if away.exists():
            away.rename(images / "validation")
        save(self, progress)

    monkeypatch.setattr(Tracker, "scalars", evaluated)
    monkeypatch.setattr(Checkpointer, "save", saved)
    out = _run(vit, images, tmp_path / "run")
    assert capfd.readouterr().err.count("no pictures of the evaluation after update 3") == 1
    assert results_of(out)["step"] == 9


def test_nothing_needs_a_home_that_can_be_written(vit: Path, images: Path, tmp_path: Path) -> None:
    """Usual on clusters. Not even root makes a folder in /proc."""
    nowhere = {"HOME": "/proc/nowhere", "HF_HOME": "/proc/nowhere/huggingface", "XDG_CACHE_HOME": "/proc/nowhere"}
    data = ("--train_dir", images / "train", "--validation_dir", images / "validation")
    trained = flags(model_name_or_path=vit, output_dir=tmp_path / "run", max_train_steps=2)
    run("lora_dist.train", *trained, *data, **nowhere)
    adapter = tmp_path / "run" / "adapter"
    result = run(
        "lora_dist.train",
        *flags(do_eval_only=True, adapter_name_or_path=adapter, output_dir=tmp_path / "evaluated"),
        *data,
        **nowhere,
    )
    assert json.loads(result.stdout)["eval_accuracy"] == results_of(tmp_path / "run")["eval_accuracy"]
