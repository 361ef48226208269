"""The moving average of the weights (`--ema_decay`): its values, resuming, and that it becomes the result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.launching import adapter_of, results_of, run_flags, saved_in
from lora_dist_testing.tiny import make_model
from torch import Tensor

from lora_dist import train
from lora_dist.training.saving import checkpoint

DECAY = 0.5


def _run(model: Path, photos: Path, out: Path, *more: object, **settings: Any) -> Path:
    given = {
        "ema_decay": DECAY,
        "max_train_steps": 6,
        "eval_steps": 1,
        "checkpointing_steps": 1,
        "save_total_limit": 99,
    }
    train.main([*run_flags(model, photos, out, **given | settings), *map(str, more)])
    return out


def _at(out: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.read(checkpoint.path_of(out / "checkpoints", step))


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_average_follows_its_formula_and_is_the_result(
    tuning: str, vit: Path, photos: Path, tmp_path: Path
) -> None:
    """Of a convolutional model too, with the statistics of its batch norms. The training itself does not change."""
    base = vit if tuning == "lora" else make_model(tmp_path / "resnet", "resnet")
    out = _run(base, photos, tmp_path / "run", tuning=tuning, learning_rate=1e-3)
    plain = _run(base, photos, tmp_path / "plain", tuning=tuning, learning_rate=1e-3, ema_decay=None)
    for step in range(1, 6):
        before, after = _at(out, step), _at(out, step + 1)
        share = 1 - min(DECAY, (1 + step) / (10 + step))
        for name, tensor in after.trained.items():
            if tensor.is_floating_point():
                expected = before.average[name].lerp(tensor, share)
                torch.testing.assert_close(after.average[name], expected, rtol=0, atol=0)
        assert not _same(after.average, after.trained)
        assert _same(after.trained, _at(plain, step + 1).trained)
    assert not _at(plain, 6).average
    if tuning == "lora":
        best = _at(out, saved_in(out)["best_step"]).average
        result = adapter_of(out)
        assert len(result) == len(best)
        assert {tensor.sum().item() for tensor in result.values()} == {tensor.sum().item() for tensor in best.values()}


def test_a_resumed_run_goes_on_with_its_average(vit: Path, photos: Path, tmp_path: Path) -> None:
    out = _run(vit, photos, tmp_path / "run", max_train_steps=3, lr_scheduler_type="constant")
    whole = _run(vit, photos, tmp_path / "whole", lr_scheduler_type="constant")
    _run(vit, photos, out, "--resume_from_checkpoint", "auto", lr_scheduler_type="constant")
    assert _same(_at(out, 6).average, _at(whole, 6).average)
    assert _same(adapter_of(out), adapter_of(whole))
    assert results_of(out)["eval_loss"] == results_of(whole)["eval_loss"]


def test_the_decay_is_part_of_the_identity_of_a_run(
    vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = _run(vit, photos, tmp_path, max_train_steps=1)
    for other, sentence in ((None, "ema_decay was 0.5 and is now None"), (0.9, "ema_decay was 0.5 and is now 0.9")):
        with pytest.raises(SystemExit):
            _run(vit, photos, out, "--resume_from_checkpoint", "auto", ema_decay=other)
        assert sentence in capfd.readouterr().err
