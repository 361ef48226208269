"""A run goes on as what it was: with its own LoRA, classes and pixels, its best measured by what it goes by now."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from lora_dist_testing.edits import edit_json
from lora_dist_testing.launching import (
    RESULTS,
    adapter_of,
    flags,
    lines_of,
    results_of,
    rewrite_states,
    run_flags,
    saved_in,
)
from lora_dist_testing.tiny import make_model
from safetensors.torch import load_file

from lora_dist import train
from lora_dist.data.batch import EvaluationImages

RESUME = ("--resume_from_checkpoint", "auto")


def _run(vit: Path, photos: Path, out: Path, *more: object) -> Path:
    train.main(
        [
            *run_flags(
                vit,
                photos,
                out,
                logging_steps=1,
                eval_steps=1,
                checkpointing_steps=1,
                save_total_limit=99,
                lr_scheduler_type="constant",
                max_train_steps=4,
            ),
            *map(str, more),
        ]
    )
    return out


def _refused(capfd: pytest.CaptureFixture[str], *run: Any) -> str:
    """What a run says that ends with an error of the user."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        _run(*run)
    assert end.value.code == 2
    return capfd.readouterr().err


def _contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _assert_same_adapter(out: Path, expected: Path) -> None:
    adapter = adapter_of(expected)
    assert all(tensor.equal(adapter[name]) for name, tensor in adapter_of(out).items())
    one, other = (json.loads((root / "adapter" / "adapter_config.json").read_text()) for root in (out, expected))
    assert one == other


LORA: list[Any] = [
    *(
        pytest.param(one, marks=pytest.mark.slow)
        for one in (("--lora_alpha", 64), ("--use_rslora", "true"), ("--init_lora_weights", "pissa"))
    ),
    flags(init_lora_weights="pissa", use_rslora="true", lora_alpha=8, lora_bias="all"),
    ("--lora_r", 4, "--lora_target_modules", "all-linear", "--use_dora", "true"),
    ("--tuning", "head"),
    ("--image_size", 48, "--pooling", "mean"),
    flags(
        lora_rank_pattern="q_proj=2",
        lora_alpha_pattern="q_proj=5",
        layers_to_transform="last:1",
        train_norms="true",
        init_lora_weights="orthogonal",
    ),
]


@pytest.mark.parametrize("lora", LORA, ids=lambda lora: " ".join(map(str, lora)))
def test_a_run_goes_on_with_its_own_lora_where_none_is_given(
    lora: tuple[object, ...], vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the middle and when it is finished; a run that was given all of it again is the control."""
    whole = _run(vit, photos, tmp_path / "whole", "--max_train_steps", 6, *lora)
    out = _run(vit, photos, tmp_path / "run", *lora)
    finished = results_of(out)
    before = shutil.copytree(out, tmp_path / "before")
    capfd.readouterr()
    _run(vit, photos, out, *RESUME)
    said = capfd.readouterr().err
    for name, value in zip(lora[::2], lora[1::2], strict=True):
        assert f"{name} {value}".lower() in said.partition("taken from the checkpoint: ")[2].partition("\n")[0].lower()
    _assert_same_adapter(out, before)
    assert results_of(out)["eval_loss"] == finished["eval_loss"]
    assert (out / "config.yaml").read_bytes() == (before / "config.yaml").read_bytes()
    _run(vit, photos, out, *RESUME, "--max_train_steps", 6)
    _assert_same_adapter(out, whole)
    assert results_of(out)["eval_loss"] == results_of(whole)["eval_loss"]


def test_a_run_goes_on_with_its_own_base_where_none_is_given(
    vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The default is another base; one that is given stays an error if it is another."""
    out = _run(vit, photos, tmp_path / "run", "--max_train_steps", 2)
    capfd.readouterr()
    words = list(map(str, run_flags(vit, photos, out, max_train_steps=3)))
    place = words.index("--model_name_or_path")
    train.main([*words[:place], *words[place + 2 :], *RESUME])
    assert f"settings taken from the checkpoint: --model_name_or_path {vit}\n" in capfd.readouterr().err
    assert saved_in(out)["step"] == 3
    other = make_model(tmp_path / "other", seed=9)
    assert "base was" in _refused(capfd, other, photos, out, *RESUME, "--max_train_steps", 5)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_stochastic_depth_layer_decay_and_sgd_go_on_to_the_bit(
    tuning: str, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The saved model has the rate of the base again; another rate of stochastic depth is another course."""
    base = make_model(tmp_path / "swin", "swin")
    more = flags(tuning=tuning, optim="sgd", learning_rate=0.1, layer_decay=0.5, gradient_accumulation_steps=2)
    more += flags(per_device_train_batch_size=4)
    deep = flags(drop_path=0.5, lora_dropout=0.1)
    whole = _run(base, photos, tmp_path / "whole", "--max_train_steps", 5, *more, *deep)
    other = _run(base, photos, tmp_path / "other", "--max_train_steps", 5, *more, "--lora_dropout", 0.1)
    out = _run(base, photos, tmp_path / "run", "--max_train_steps", 2, *more, *deep)
    _run(base, photos, out, *RESUME, "--max_train_steps", 5, *more, *deep)
    _assert_same_checkpoint(out, whole, 5)
    kept = sorted(load_file(out / "checkpoints" / "step-00000005" / "optimizer.safetensors"))
    assert {name.partition("/")[0] for name in kept} == {"momentum_buffer"}
    with pytest.raises(AssertionError):
        _assert_same_checkpoint(other, whole, 5)
    result = out / ("model" if tuning == "full" else "adapter")
    assert json.loads((result / "config.json").read_text())["drop_path_rate"] == 0.1
    said = _refused(capfd, base, photos, out, *RESUME, "--tuning", tuning, "--max_train_steps", 6)
    assert "optim was sgd and is now adamw_torch" in said


def test_lora_that_is_given_and_differs_is_an_error_naming_both(
    vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a flag or in a recipe; what is the same, or differs in its spelling alone, is fine."""
    out = _run(vit, photos, tmp_path / "run", "--lora_alpha", 64, "--use_rslora", "true")
    before = _contents(out)
    said = _refused(capfd, vit, photos, out, *RESUME, "--lora_alpha", 16, "--use_rslora", "false", "--lora_r", 16)
    assert "--lora_alpha is 16, but the checkpoint has 64" in said
    assert "--use_rslora is False, but the checkpoint has True" in said
    assert "lora_r" not in said
    (tmp_path / "recipe.yaml").write_text("lora_alpha: 8\n")
    said = _refused(capfd, vit, photos, out, *RESUME, "--config", tmp_path / "recipe.yaml")
    assert "--lora_alpha is 8, but the checkpoint has 64" in said
    said = _refused(capfd, vit, photos, out, *RESUME, "--tuning", "head")
    assert "--tuning is head, but the checkpoint has lora" in said
    said = _refused(capfd, vit, photos, out, *RESUME, "--lora_target_modules", "query")
    assert "have other names or shapes" in said
    assert _contents(out) == before
    _run(vit, photos, out, *RESUME, "--lora_alpha", 64, "--lora_target_modules", "query,value", "--max_train_steps", 5)
    assert results_of(out)["step"] == 5


def _forget(state: dict[str, Any]) -> None:
    """Leaves of the identity what the first releases wrote."""
    known = ("base", "start", "tuning", "seed", "effective_batch", "train_data", "order")
    state["identity"] = {name: state["identity"][name] for name in known}
    for name in ("best_metric", "best_data"):
        del state["progress"][name]


def test_an_old_checkpoint_goes_on_with_what_the_settings_beside_it_say(
    vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = _run(vit, photos, tmp_path / "whole", "--lora_alpha", 64, "--max_train_steps", 6)
    out = _run(vit, photos, tmp_path / "run", "--lora_alpha", 64)
    rewrite_states(out, _forget)
    said = _refused(capfd, vit, photos, out, *RESUME, "--lora_alpha", 8)
    assert "--lora_alpha is 8, but the checkpoint has 64" in said
    # From its directory into another one as well.
    newest = sorted((out / "checkpoints").iterdir())[-1]
    other = _run(vit, photos, tmp_path / "other", "--resume_from_checkpoint", newest, "--max_train_steps", 6)
    assert json.loads((other / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 64
    _run(vit, photos, out, *RESUME, "--max_train_steps", 6)
    _assert_same_adapter(out, whole)


def test_an_old_checkpoint_without_settings_beside_it_goes_on_as_it_is_told(
    vit: Path, photos: Path, tmp_path: Path
) -> None:
    whole = _run(vit, photos, tmp_path / "whole", "--lora_alpha", 64, "--max_train_steps", 6)
    out = _run(vit, photos, tmp_path / "run", "--lora_alpha", 64)
    rewrite_states(out, _forget)
    (out / "config.yaml").unlink()
    _run(vit, photos, out, *RESUME, "--lora_alpha", 64, "--max_train_steps", 6)
    _assert_same_adapter(out, whole)


def test_other_pixels_and_other_classes_are_another_run(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the trained tensors mean is in the processor of the base and in the names of the classes as well."""
    base = make_model(tmp_path / "base")
    shutil.copytree(photos, tmp_path / "photos")
    out = _run(base, tmp_path / "photos", tmp_path / "run")
    before = _contents(out)
    processor = base / "preprocessor_config.json"
    original = processor.read_text()
    edit_json(processor, image_mean=[0.4, 0.5, 0.6], resample=3)
    said = _refused(capfd, base, tmp_path / "photos", out, *RESUME)
    assert "processor.image_mean was [0.5, 0.5, 0.5] and is now [0.4, 0.5, 0.6]" in said
    assert "processor.resample was 2 and is now 3" in said
    assert "processor.image_std" not in said
    processor.write_text(original)
    config = base / "config.json"
    original = config.read_text()
    edit_json(config, hidden_act="relu")
    said = _refused(capfd, base, tmp_path / "photos", out, *RESUME)
    assert "config.hidden_act was gelu and is now relu" in said
    config.write_text(original)
    for part in ("train", "validation"):
        (tmp_path / "photos" / part / "b").rename(tmp_path / "photos" / part / "bee")
    said = _refused(capfd, base, tmp_path / "photos", out, *RESUME)
    assert "class 1 was b and is now bee" in said
    assert "class 0" not in said
    for part in ("train", "validation"):
        (tmp_path / "photos" / part / "bee").rename(tmp_path / "photos" / part / "b")
    assert _contents(out) == before
    _run(base, tmp_path / "photos", out, *RESUME, "--max_train_steps", 5)
    assert results_of(out)["step"] == 5


def test_an_adapter_whose_scale_has_changed_is_another_start(
    vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its tensors are the same."""
    first = _run(vit, photos, tmp_path / "first", "--lora_alpha", 64, "--lora_r", 4)
    more = ("--adapter_name_or_path", first / "adapter")
    out = _run(vit, photos, tmp_path / "run", *more)
    path = first / "adapter" / "adapter_config.json"
    original = path.read_text()
    edit_json(path, lora_alpha=8)
    assert "lora_alpha was 64 and is now 8" in _refused(capfd, vit, photos, out, *RESUME, *more)
    path.write_text(original)
    assert results_of(_run(vit, photos, out, *RESUME, *more, "--max_train_steps", 5))["step"] == 5


def _evaluated(out: Path, metric: str) -> dict[int, float]:
    """The metric of each update that was evaluated."""
    return {line["step"]: line[f"eval/{metric}"] for line in lines_of(out) if f"eval/{metric}" in line}


def _assert_same_checkpoint(out: Path, expected: Path, step: int) -> None:
    for name in ("trained.safetensors", "optimizer.safetensors"):
        found, whole = (load_file(root / "checkpoints" / f"step-{step:08d}" / name) for root in (out, expected))
        assert found.keys() == whole.keys()
        assert all(tensor.equal(whole[key]) for key, tensor in found.items())


def test_a_processor_entry_that_is_gone_is_another_run(
    vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(vit, tmp_path / "vit"))
    path = model / "preprocessor_config.json"
    original = path.read_text()
    edit_json(path, do_center_crop=True, crop_size={"height": 32, "width": 32})
    out = _run(model, photos, tmp_path / "run", "--max_train_steps", 2)
    path.write_text(original)
    said = _refused(capfd, model, photos, out, *RESUME, "--max_train_steps", 3)
    assert "processor.do_center_crop was True and is now None" in said


def test_a_run_that_stopped_early_keeps_the_settings_that_it_was_made_with(
    vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    early = ("--learning_rate", 1e-30, "--early_stopping_patience", 1, "--max_train_steps", 40)
    out = _run(vit, photos, tmp_path / "run", *early)
    assert results_of(out)["step"] < 40
    before = yaml.safe_load((out / "config.yaml").read_text())
    _run(vit, photos, out, *RESUME, *early[2:], "--learning_rate", 0.5)
    assert "--learning_rate was 1e-30 when the run began and is now 0.5; ignored" in capfd.readouterr().err
    assert yaml.safe_load((out / "config.yaml").read_text()) == before


def test_results_measured_by_another_metric_are_put_aside(
    vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = _run(vit, photos, tmp_path / "run")
    before = {name: (out / name).read_bytes() for name in ("all_results.json", "adapter/adapter_model.safetensors")}
    _run(vit, photos, out, *RESUME, "--metric_for_best_model", "loss")
    assert "are selected and measured by another --metric_for_best_model: moved to" in capfd.readouterr().err
    aside = out / "abandoned-results"
    assert {name: (aside / name).read_bytes() for name in before} == before
    assert (out / "adapter").is_dir()
    _run(vit, photos, out, *RESUME, "--metric_for_best_model", "loss")
    assert [path.name for path in out.glob("abandoned-results*")] == ["abandoned-results"]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_best_is_measured_anew_by_another_metric(
    tuning: str, vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A loss of more than 1 is no accuracy that nothing can beat. Weights, batch norms among them, stay."""
    base, rate = (vit, 1e-3) if tuning == "lora" else (make_model(tmp_path / "resnet", "resnet"), 1e-3)
    more = ("--tuning", tuning, "--learning_rate", rate)
    whole = _run(base, photos, tmp_path / "whole", *more, "--metric_for_best_model", "loss", "--max_train_steps", 9)
    out = _run(base, photos, tmp_path / "run", *more, "--metric_for_best_model", "loss")
    losses, accuracies = _evaluated(whole, "loss"), _evaluated(whole, "accuracy")
    best = saved_in(out)["best_step"]
    assert losses[best] == min(losses[step] for step in range(1, 5)) == saved_in(out)["best_value"]
    later = max(range(5, 10), key=lambda step: (accuracies[step], -step))
    assert accuracies[later] > accuracies[best], "nothing gets better, which proves nothing"
    capfd.readouterr()
    _run(base, photos, out, *more, *RESUME, "--metric_for_best_model", "accuracy", "--max_train_steps", 9)
    said = capfd.readouterr().err
    assert f"the best so far, update {best}, was selected by loss {losses[best]:.4f}. Re-evaluated" in said
    assert f"update {best} has accuracy {accuracies[best]:.4f}" in said
    assert (results_of(out)["best_step"], results_of(out)["eval_accuracy"]) == (later, accuracies[later])
    _assert_same_checkpoint(out, whole, 9)
    _run(base, photos, out, *more, *RESUME, "--metric_for_best_model", "accuracy", "--max_train_steps", 9)
    assert "Re-evaluated" not in capfd.readouterr().err


@pytest.mark.parametrize("other", ["files", "selection"])
def test_the_best_is_measured_anew_on_other_validation_data(
    other: str, vit: Path, photos: Path, misled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Here the current update turns out to be better than the best so far."""
    loss, given = (
        ("--metric_for_best_model", "loss", "--max_train_steps", 9),
        ("--validation_dir", misled / "validation"),
    )
    change: tuple[object, ...] = ("--validation_dir", photos / "validation")
    if other == "selection":
        change = (*change, "--max_eval_samples", 5)
        given = (*given, "--max_eval_samples", 9)
    control = _run(vit, photos, tmp_path / "control", *loss, *change)
    out = _run(vit, misled, tmp_path / "run", *loss, "--train_dir", photos / "train", *given)
    best, losses = saved_in(out)["best_step"], _evaluated(control, "loss")
    assert losses[best] > losses[9], "the best is the best by both, which proves nothing"
    capfd.readouterr()
    _run(vit, photos, out, *loss, *RESUME, *change)
    said = capfd.readouterr().err
    assert f"the best so far, update {best}, was selected by loss" in said
    assert "on other validation data. Re-evaluated" in said
    assert f"update {best} has loss {losses[best]:.4f}, update 9 has loss {losses[9]:.4f}" in said
    assert (saved_in(out)["best_step"], results_of(out)["best_step"]) == (9, 9)
    assert results_of(out)["eval_loss"] == pytest.approx(losses[9])
    _assert_same_adapter(out, control)
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written["validation_dir"] == str(photos / "validation")
    assert f"validation_dir: {photos / 'validation'}" in (out / "adapter" / "README.md").read_text()


def test_patience_begins_anew_with_the_measure(
    vit: Path, photos: Path, misled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = ("--metric_for_best_model", "loss", "--early_stopping_patience", 2, "--max_train_steps", 9, "--train_dir")
    out = _run(vit, misled, tmp_path, *more, photos / "train")
    stopped = results_of(out)["step"]
    assert stopped < 9
    capfd.readouterr()
    _run(vit, misled, out, *more, photos / "train", *RESUME)
    assert results_of(out)["step"] == stopped
    assert "Re-evaluated" not in capfd.readouterr().err
    _run(vit, photos, out, *more, photos / "train", *RESUME)
    assert results_of(out)["step"] > stopped


def test_an_old_checkpoint_has_its_best_measured_by_what_the_run_goes_by(
    vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It does not say by what, so that is taken for unchanged."""
    out = _run(vit, photos, tmp_path)
    before = saved_in(out)
    assert before["best_metric"] == "accuracy"
    rewrite_states(out, _forget)
    capfd.readouterr()
    _run(vit, photos, out, *RESUME, "--max_train_steps", 5, "--learning_rate", 1e-30)
    assert "Re-evaluated" not in capfd.readouterr().err
    after = saved_in(out)
    assert {name: after[name] for name in ("best_step", "best_value", "best_metric", "best_data")} == {
        name: before[name] for name in ("best_step", "best_value", "best_metric", "best_data")
    }


def test_a_best_that_cannot_be_read_is_set_aside_and_told(
    vit: Path, photos: Path, misled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loss = ("--metric_for_best_model", "loss")
    out = _run(vit, misled, tmp_path, *loss, "--train_dir", photos / "train")
    best = saved_in(out)["best_step"]
    assert best < 4
    shutil.rmtree(out / "checkpoints" / f"step-{best:08d}")
    capfd.readouterr()
    _run(vit, photos, out, *loss, *RESUME)
    assert f"the best checkpoint (update {best}) is missing" in capfd.readouterr().err
    assert saved_in(out)["best_step"] == results_of(out)["best_step"] == 4


@pytest.mark.usefixtures("handlers")
def test_a_stop_while_the_best_is_measured_anew_loses_nothing(
    vit: Path, photos: Path, misled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--metric_for_best_model", "loss", "--per_device_eval_batch_size", 1, "--train_dir", photos / "train")
    out = _run(vit, misled, tmp_path / "run", *more)
    expected = _run(vit, photos, shutil.copytree(out, tmp_path / "expected"), *more, *RESUME)
    original = EvaluationImages.__getitems__

    def signalled(self: EvaluationImages, rows: list[int]) -> Any:
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # until it has been read
        return original(self, rows)

    monkeypatch.setattr(EvaluationImages, "__getitems__", signalled)
    with pytest.raises(SystemExit) as end:
        _run(vit, photos, out, *more, *RESUME)
    assert end.value.code == 75
    _run(vit, photos, out, *more, *RESUME)
    _assert_same_adapter(out, expected)
    assert saved_in(out) == saved_in(expected)


def test_no_results_are_overwritten(vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of another run, of one whose checkpoints are gone, and of the course that a run leaves when it is wound back."""
    one = _run(vit, photos, tmp_path / "one", "--lora_alpha", 64)
    other = _run(vit, photos, tmp_path / "other")
    second, before = one / "checkpoints" / "step-00000002", _contents(other)
    said = _refused(capfd, vit, photos, other, "--resume_from_checkpoint", second)
    assert f"{second} is not a checkpoint of the run in --output_dir {other}" in said
    assert _contents(other) == before
    shutil.rmtree(other / "checkpoints")
    before = _contents(other)
    assert "no complete checkpoint to resume from" in _refused(capfd, vit, photos, other, *RESUME)
    assert _contents(other) == before

    before = _contents(one)
    _run(vit, photos, one, "--resume_from_checkpoint", second, "--max_train_steps", 3)
    aside = _contents(one / "abandoned-results")
    assert aside == {name: before[name] for name in aside}
    assert {name.partition("/")[0] for name in aside} == RESULTS
    assert results_of(one)["step"] == 3
    _run(vit, photos, one, *RESUME, "--max_train_steps", 4)
    assert results_of(one)["step"] == 4
    assert len(list(one.glob("abandoned-*"))) == 1
