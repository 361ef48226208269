"""A run goes on as what it was: with its own LoRA, classes and pixels, its best measured by what it goes by now."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import adapter_of, lines_of, results_of, saved_in
from tiny import make_folder, make_model

from lora_dist import train
from lora_dist.training.checkpoint import COMPLETE, STATE

RESUME = ("--resume_from_checkpoint", "auto")


def _run(vit: Path, photos: Path, out: Path, *more: object) -> Path:
    train.main(
        [str(word) for word in (
            "--model_name_or_path", vit, "--train_dir", photos / "train", "--validation_dir", photos / "validation",
            "--output_dir", out, "--logging_steps", 1, "--mixed_precision", "no", "--per_device_train_batch_size", 8,
            "--gradient_accumulation_steps", 1, "--eval_steps", 1, "--checkpointing_steps", 1, "--save_total_limit", 99,
            "--lr_scheduler_type", "constant", "--max_train_steps", 4, *more,
        )]
    )  # fmt: skip
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


def _rewrite_states(out: Path, change: Any) -> None:
    """Changes the state in every checkpoint of a run, as another release would have written it."""
    for path in (out / "checkpoints").iterdir():
        state = json.loads((path / STATE).read_text())
        change(state)
        (path / STATE).write_text(json.dumps(state))
        manifest = json.loads((path / COMPLETE).read_text())
        content = (path / STATE).read_bytes()
        manifest[STATE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (path / COMPLETE).write_text(json.dumps(manifest))


LORA: list[tuple[object, ...]] = [
    ("--lora_alpha", 64),
    ("--use_rslora", "true"),
    ("--init_lora_weights", "pissa"),
    ("--init_lora_weights", "pissa", "--use_rslora", "true", "--lora_alpha", 8, "--lora_bias", "all"),
    ("--lora_r", 4, "--lora_target_modules", "all-linear", "--use_dora", "true"),
    ("--tuning", "head"),
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


def test_lora_that_is_given_and_differs_is_an_error_naming_both(
    vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a flag or in a recipe; what is the same, or differs in its spelling alone, is fine."""
    out = _run(vit, photos, tmp_path / "run", "--lora_alpha", 64, "--use_rslora", "true")
    before = _contents(out)
    said = _refused(capfd, vit, photos, out, *RESUME, "--lora_alpha", 16, "--use_rslora", "false", "--lora_r", 16)
    assert "--lora_alpha is 16, and the checkpoint has 64" in said
    assert "--use_rslora is False, and the checkpoint has True" in said
    assert "lora_r" not in said
    (tmp_path / "recipe.yaml").write_text("lora_alpha: 8\n")
    said = _refused(capfd, vit, photos, out, *RESUME, "--config", tmp_path / "recipe.yaml")
    assert "--lora_alpha is 8, and the checkpoint has 64" in said
    said = _refused(capfd, vit, photos, out, *RESUME, "--tuning", "head")
    assert "--tuning is head, and the checkpoint has lora" in said
    said = _refused(capfd, vit, photos, out, *RESUME, "--lora_target_modules", "query")
    assert "trains other tensors" in said
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
    _rewrite_states(out, _forget)
    said = _refused(capfd, vit, photos, out, *RESUME, "--lora_alpha", 8)
    assert "--lora_alpha is 8, and the checkpoint has 64" in said
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
    _rewrite_states(out, _forget)
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
    processor.write_text(json.dumps(json.loads(original) | {"image_mean": [0.4, 0.5, 0.6], "resample": 3}))
    said = _refused(capfd, base, tmp_path / "photos", out, *RESUME)
    assert "processor.image_mean was [0.5, 0.5, 0.5] and is now [0.4, 0.5, 0.6]" in said
    assert "processor.resample was 2 and is now 3" in said
    assert "processor.image_std" not in said
    processor.write_text(original)
    config = base / "config.json"
    original = config.read_text()
    config.write_text(json.dumps(json.loads(original) | {"hidden_act": "relu"}))
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
    path.write_text(json.dumps(json.loads(original) | {"lora_alpha": 8}))
    assert "lora_alpha was 64 and is now 8" in _refused(capfd, vit, photos, out, *RESUME, *more)
    path.write_text(original)
    assert results_of(_run(vit, photos, out, *RESUME, *more, "--max_train_steps", 5))["step"] == 5
