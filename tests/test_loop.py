"""A run stops where it should, hands over its best, and does so with every way of tuning."""

from pathlib import Path

import pytest
import torch
from launching import lines_of, results_of
from torch import nn

from lora_dist import train
from lora_dist.bundle import load_classifier
from lora_dist.config import DataSettings
from lora_dist.data import load_data
from lora_dist.transforms import ImageTransforms


def _run(vit: Path, photos: Path, out: Path, *more: object) -> Path:
    train.main(
        [str(word) for word in (
            "--model_name_or_path", vit, "--train_dir", photos / "train", "--validation_dir", photos / "validation",
            "--output_dir", out, "--logging_steps", 1, "--mixed_precision", "no", "--per_device_train_batch_size", 8,
            "--gradient_accumulation_steps", 1, "--eval_steps", 1, "--max_train_steps", 9, *more,
        )]
    )  # fmt: skip
    return out


@pytest.mark.parametrize("patience", [1, 3])
def test_a_run_that_gets_no_better_stops_early(patience: int, vit: Path, photos: Path, tmp_path: Path) -> None:
    """With a learning rate that changes nothing, the first evaluation stays the best."""
    _run(vit, photos, tmp_path, "--early_stopping_patience", patience, "--learning_rate", 1e-30)
    results = results_of(tmp_path)
    assert results["step"] == 1 + patience
    assert results["best_step"] == 1
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


def test_what_is_handed_over_is_the_best_and_not_the_last(vit: Path, photos: Path, tmp_path: Path) -> None:
    """A rate this high spoils what the first updates reach."""
    more = ("--metric_for_best_model", "loss", "--learning_rate", 0.5, "--lr_scheduler_type", "constant")
    _run(vit, photos, tmp_path, *more)
    losses = {line["step"]: line["eval/loss"] for line in lines_of(tmp_path) if "eval/loss" in line}
    results = results_of(tmp_path)
    best = min(losses, key=lambda step: losses[step])
    assert best != 9, "the last update happened to be the best, which proves nothing"
    assert results["best_step"] == best
    assert results["eval_loss"] == pytest.approx(losses[best], rel=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        ("--init_lora_weights", "pissa"),
        ("--init_lora_weights", "pissa", "--use_rslora", "true", "--lora_bias", "all"),
        ("--use_dora", "true", "--loraplus_lr_ratio", 16),
        ("--gradient_checkpointing", "true", "--lora_target_modules", "query,value,fc2"),
        ("--tuning", "head"),
        ("--tuning", "full", "--learning_rate", 1e-3),
        ("--tuning", "full", "--init_from_config", "true", "--mixup_alpha", 0.4, "--cutmix_alpha", 1.0),
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
