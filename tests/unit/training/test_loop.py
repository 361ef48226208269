"""A run stops where it should or is told to, hands over its best, and does so with every way of tuning."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.launching import adapter_of, assert_same_run, flags, lines_of, results_of, run_flags, saved_in
from torch import nn

from lora_dist import train
from lora_dist.data.batch import EvaluationImages
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sources.load import load_data
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.settings.train import DataSettings
from lora_dist.training.reporting.tracking import Tracker
from lora_dist.training.saving.result_writer import ResultWriter


def _run(vit: Path, photos: Path, out: Path, *more: object) -> Path:
    train.main([*run_flags(vit, photos, out, logging_steps=1, eval_steps=1, max_train_steps=9), *map(str, more)])
    return out


@pytest.mark.parametrize("patience", [1, 3])
def test_a_run_that_gets_no_better_stops_early(
    patience: int, vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate that changes nothing, the first evaluation stays the best."""
    _run(vit, photos, tmp_path, "--early_stopping_patience", patience, "--learning_rate", 1e-30)
    results = results_of(tmp_path)
    assert results["step"] == 1 + patience
    assert results["best_step"] == 1
    number = "the last evaluation" if patience == 1 else f"the last {patience} evaluations"
    told = f"stopped early: accuracy has not improved in {number} (--early_stopping_patience)"
    assert told in capfd.readouterr().err
    assert [line["step"] for line in lines_of(tmp_path) if "train/loss" in line] == list(range(1, 2 + patience))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_that_gets_better_does_not_stop_early(vit: Path, photos: Path, tmp_path: Path) -> None:
    more = ("--early_stopping_patience", 1, "--metric_for_best_model", "loss", "--augmentation", "none")
    _run(vit, photos, tmp_path, *more, "--learning_rate", 5e-3, "--lora_dropout", 0)
    results = results_of(tmp_path)
    assert results["step"] == 9
    losses = [line["eval/loss"] for line in lines_of(tmp_path) if "eval/loss" in line]
    assert losses == sorted(losses, reverse=True)
    assert results["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


def test_what_is_handed_over_is_the_best_and_not_the_last(vit: Path, misled: Path, tmp_path: Path) -> None:
    _run(vit, misled, tmp_path, "--metric_for_best_model", "loss")
    losses = {line["step"]: line["eval/loss"] for line in lines_of(tmp_path) if "eval/loss" in line}
    results = results_of(tmp_path)
    best = min(losses, key=lambda step: losses[step])
    assert best != 9, "the last update happened to be the best, which proves nothing"
    assert results["best_step"] == best
    assert results["eval_loss"] == pytest.approx(losses[best], rel=1e-4)


def test_the_last_loss_is_that_of_the_updates_since_the_last_log(vit: Path, photos: Path, tmp_path: Path) -> None:
    """Where the run ends early as well: here after update 3, in the window from 3 to 4."""
    losses = {}
    for every in (1, 2, 4):
        more = ("--early_stopping_patience", 2, "--learning_rate", 1e-30, "--logging_steps", every)
        out = _run(vit, photos, tmp_path / str(every), *more)
        assert results_of(out)["step"] == 3
        losses[every] = {line["step"]: line["train/loss"] for line in lines_of(out) if "train/loss" in line}
    one, two, three = losses[1].values()
    assert losses[2] == pytest.approx({2: (one + two) / 2, 3: three})
    assert losses[4] == pytest.approx({3: (one + two + three) / 3})


def _sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)  # until it has been read


def _die() -> None:
    raise KeyboardInterrupt


def _after(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str, acts: dict[int, Callable[[], None]], run: tuple[Any, ...]
) -> int | None:
    """A run that is interrupted: what happens after which call of a method. Returns its exit code."""
    original, calls = getattr(owner, method), 0

    def watched(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        result = original(self, *arguments)
        calls += 1
        if calls in acts:
            acts[calls]()
        return result

    monkeypatch.setattr(owner, method, watched)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
        _run(*run)
    monkeypatch.undo()
    return getattr(end.value, "code", None)


LOGGED = ("--logging_steps", 4, "--eval_steps", 3, "--checkpointing_steps", "no")


@pytest.fixture(scope="module")
def whole(vit: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    _run(vit, photos, out, *LOGGED)
    return out


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("step", "logged"), [(3, 0), (4, 4), (6, 4), (9, 8)])
def test_a_run_that_was_told_to_stop_goes_on_as_if_it_had_not_been(
    step: int, logged: int, vit: Path, photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two logs, at one, in an epoch and at its end; and after the last update, which is logged nevertheless."""
    broken = tmp_path / "broken"
    code = _after(monkeypatch, Tracker, "advance", {step: _sigterm}, (vit, photos, broken, *LOGGED))
    assert code == 75
    assert (saved_in(broken)["step"], saved_in(broken)["logged_step"]) == (step, logged)
    _run(vit, photos, broken, *LOGGED, "--resume_from_checkpoint", "auto")
    assert_same_run(broken, whole)


@pytest.mark.usefixtures("handlers")
def test_an_evaluation_that_was_left_is_made_first(
    vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it ends the run: the third one, in whose fifth image the signal comes, is as good as the first."""
    more = flags(logging_steps=4, early_stopping_patience=2, learning_rate=1e-30, per_device_eval_batch_size=1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _run(vit, photos, whole, *more)
    _after(monkeypatch, EvaluationImages, "__getitems__", {2 * 9 + 5: _sigterm}, (vit, photos, broken, *more))
    saved = saved_in(broken)
    assert (saved["step"], saved["last_evaluated_step"], saved["stale_evaluations"]) == (3, 2, 1)
    _run(vit, photos, broken, *more, "--resume_from_checkpoint", "auto")
    assert results_of(broken)["step"] == 3
    assert_same_run(broken, whole)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("asked", [False, True])
def test_no_evaluation_is_logged_twice(
    asked: bool, vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run that dies in update 5, after the checkpoint of update 4 and the evaluation that was due there."""
    more = flags(eval_steps=2, checkpointing_steps="no", learning_rate=1e-30, per_device_eval_batch_size=1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _run(vit, photos, whole, *more)
    run = (vit, photos, broken, *more)
    if asked:
        _after(monkeypatch, Tracker, "advance", {4: (broken / "SAVE").touch, 5: _die}, run)
    else:
        _after(monkeypatch, EvaluationImages, "__getitems__", {9 + 5: _sigterm}, run)
        run = (*run, "--resume_from_checkpoint", "auto")
        _after(monkeypatch, Tracker, "advance", {1: _die}, run)
    assert saved_in(broken)["step"] == saved_in(broken)["last_evaluated_step"] == 4
    _run(vit, photos, broken, *more, "--resume_from_checkpoint", "auto")
    assert_same_run(broken, whole)


def test_an_evaluation_that_was_logged_and_not_saved_is_logged_once(
    vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run that dies right after the line of its second evaluation, which follows four lines of updates."""
    more = ("--eval_steps", 2, "--checkpointing_steps", "no")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _run(vit, photos, whole, *more)
    _after(monkeypatch, Tracker, "scalars", {6: _die}, (vit, photos, broken, *more))
    assert "eval/loss" in lines_of(broken)[-1]
    assert (saved_in(broken)["step"], saved_in(broken)["last_evaluated_step"]) == (4, 3)
    _run(vit, photos, broken, *more, "--resume_from_checkpoint", "auto")
    assert_same_run(broken, whole)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("eval_steps", "evaluated"), [("no", 0), (5, 2 * 9)])
def test_the_final_evaluation_is_left_as_well_and_made_when_the_run_goes_on(
    eval_steps: object, evaluated: int, vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last state is saved before it, whatever is saved beside."""
    more = flags(
        eval_steps=eval_steps, checkpointing_steps="no", per_device_eval_batch_size=1, metric_for_best_model="loss"
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _run(vit, photos, whole, *more)
    acts = {evaluated + 5: _sigterm}
    assert _after(monkeypatch, EvaluationImages, "__getitems__", acts, (vit, photos, broken, *more)) == 75
    assert saved_in(broken)["step"] == 9
    assert not (broken / "adapter").exists()
    _run(vit, photos, broken, *more, "--resume_from_checkpoint", "auto")
    assert adapter_of(broken).keys() == adapter_of(whole).keys()
    assert all(tensor.equal(adapter_of(whole)[name]) for name, tensor in adapter_of(broken).items())
    assert results_of(broken)["eval_loss"] == results_of(whole)["eval_loss"]


@pytest.mark.usefixtures("handlers")
def test_a_signal_while_the_result_is_written_does_not_keep_it_from_being_whole(
    vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the file that asks for a checkpoint, which there is by then, goes away."""
    finalize = ResultWriter.finalize

    def signalled(self: ResultWriter, *arguments: Any) -> None:
        (tmp_path / "SAVE").touch()
        _sigterm()
        finalize(self, *arguments)

    monkeypatch.setattr(ResultWriter, "finalize", signalled)
    _run(vit, photos, tmp_path, "--eval_steps", "no")
    assert results_of(tmp_path)["step"] == 9
    assert load_classifier(tmp_path / "adapter").labels == ["a", "b", "c"]
    assert not (tmp_path / "SAVE").exists()


@pytest.mark.parametrize(
    "more",
    [
        ("--init_lora_weights", "pissa"),
        ("--init_lora_weights", "pissa", "--use_rslora", "true", "--lora_bias", "all"),
        ("--use_dora", "true", "--loraplus_lr_ratio", 16),
        ("--gradient_checkpointing", "true", "--lora_target_modules", "query,value,fc2"),
        ("--tuning", "head"),
        ("--tuning", "full", "--learning_rate", 1e-3),
        flags(tuning="full", init_from_config="true", mixup_alpha=0.4, cutmix_alpha=1.0),
    ],
    ids=lambda more: " ".join(map(str, more)),
)
def test_every_way_of_tuning_trains_and_hands_over_what_it_evaluated(
    more: tuple[object, ...], vit: Path, photos: Path, tmp_path: Path
) -> None:
    _run(vit, photos, tmp_path, "--eval_steps", 3, "--max_train_steps", 3, *more)
    written = load_classifier(tmp_path / ("model" if "full" in more else "adapter"))
    data = load_data(DataSettings(train_dir=str(photos / "train"), validation_dir=str(photos / "validation")), 0)
    pixels = ImageTransforms(written.processor).batch([data.validation.image(row) for row in range(9)])
    with torch.inference_mode():
        logits = written.model(pixel_values=pixels).logits
    loss = float(nn.functional.cross_entropy(logits, torch.from_numpy(data.validation.labels)))
    assert loss == pytest.approx(results_of(tmp_path)["eval_loss"], rel=1e-4)


def test_a_model_that_is_no_better_than_the_largest_class_is_told(
    vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _run(vit, photos, tmp_path / "chance", "--learning_rate", 1e-30, "--max_train_steps", 2)
    accuracy = results_of(tmp_path / "chance")["eval_accuracy"]
    assert accuracy <= 0.34
    assert f"accuracy {accuracy:.4f} is not above the share of the largest class, 0.3333" in capfd.readouterr().err
    _run(vit, photos, tmp_path / "learned")
    assert results_of(tmp_path / "learned")["eval_accuracy"] > 0.34
    assert "share of the largest class" not in capfd.readouterr().err
