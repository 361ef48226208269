"""A head trains on features as it trains on the images, and only where that is the same."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.edits import edit_json
from lora_dist_testing.launching import adapter_of, results_of, run_flags
from lora_dist_testing.tiny import make_model

from lora_dist import train
from lora_dist.training import frozen_backbone

HEAD = {"tuning": "head", "augmentation": "none", "max_train_steps": 5, "eval_steps": 2, "learning_rate": 0.05}
BAD = {"on_bad_image": "skip", "class_weights": "balanced", "per_device_train_batch_size": 5}


def _run(base: Path, photos: Path, out: Path, **settings: Any) -> Path:
    train.main(run_flags(base, photos, out, **{**HEAD, **settings}))
    return out


@pytest.mark.parametrize(("kind", "more"), [("resnet", {}), ("vit", BAD)], ids=["resnet", "vit, bad image, weights"])
def test_a_head_trains_on_features_as_on_images(
    kind: str,
    more: dict[str, Any],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    base, data = make_model(tmp_path / "base", kind), tmp_path / "photos"
    shutil.copytree(photos, data)
    if more:
        for file in ("train/a/003.png", "validation/b/101.png"):
            (data / file).write_bytes(b"broken")
    found = _run(base, data, tmp_path / "features", **more)
    assert "the head trains on them" in capfd.readouterr().err
    monkeypatch.setattr(frozen_backbone, "MAX_BYTES", 0)
    expected = _run(base, data, tmp_path / "images", **more)
    assert "the head trains on images, not on features computed once: they would take 0.0 GiB" in capfd.readouterr().err
    for name, tensor in adapter_of(expected).items():
        torch.testing.assert_close(adapter_of(found)[name], tensor, rtol=1e-4, atol=1e-6)
    one, other = results_of(found), results_of(expected)
    for name in other:
        if name.startswith("eval_"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name
    assert one["unreadable_images"] == other["unreadable_images"]
    assert bool(one["unreadable_images"]["validation"]) == bool(more)


@pytest.mark.parametrize(
    ("dropout", "more", "reason"),
    [(0.5, {}, "the backbone has dropout"), (0.0, {"mixup_alpha": 0.2}, "images are mixed")],
    ids=["dropout", "mixup"],
)
def test_what_differs_between_epochs_trains_on_images(
    dropout: float,
    more: dict[str, Any],
    reason: str,
    vit: Path,
    photos: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    base = Path(shutil.copytree(vit, tmp_path / "base"))
    edit_json(base / "config.json", hidden_dropout_prob=dropout)
    _run(base, photos, tmp_path / "run", max_train_steps=1, **more)
    assert f"the head trains on images, not on features computed once: {reason}" in capfd.readouterr().err


def test_a_run_goes_on_with_features(vit: Path, photos: Path, tmp_path: Path) -> None:
    constant = {"lr_scheduler_type": "constant", "eval_steps": "no"}
    whole = _run(vit, photos, tmp_path / "whole", **constant)
    out = _run(vit, photos, tmp_path / "run", **constant, max_train_steps=3)
    _run(vit, photos, out, **constant, resume_from_checkpoint="auto")
    assert all(tensor.equal(adapter_of(out)[name]) for name, tensor in adapter_of(whole).items())
