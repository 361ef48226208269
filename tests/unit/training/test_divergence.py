"""Updates whose loss is not finite are left out, up to a number in a row, and what is saved is the last good state."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from lora_dist_testing.launching import lines_of, results_of, run_flags
from safetensors.torch import load_file

from lora_dist import train
from lora_dist.data.pixels.images import Picture
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.pixels.views import View
from lora_dist.training import loop


def _run(
    vit: Path, photos: Path, out: Path, bad_epochs: set[int], monkeypatch: pytest.MonkeyPatch, *more: object
) -> None:
    """Two updates an epoch, of 27 samples; in some epochs row 5 is infinitely bright."""
    original = ImageTransforms.view

    def view(self: ImageTransforms, picture: Picture, seed: tuple[int, ...]) -> View:
        _, epoch, row = seed
        found = original(self, picture, seed)
        pixels = self.finished(found.pixels[None])[0]
        return View(pixels * torch.inf if row == 5 and epoch in bad_epochs else pixels, found.erased)

    arguments = (
        *run_flags(
            vit, photos, out, logging_steps=1, per_device_train_batch_size=14, num_train_epochs=4, checkpointing_steps=1
        ),
        *more,
    )
    with monkeypatch.context() as patched:
        patched.setattr(ImageTransforms, "view", view)
        train.main([str(word) for word in arguments])


def test_one_update_is_left_out_and_the_others_are_made(
    vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _run(vit, photos, tmp_path / "run", {1}, monkeypatch)
    said = capfd.readouterr().err
    assert said.count("is not finite: update skipped") == 1
    assert "a/005.png" in said
    assert results_of(tmp_path / "run")["skipped_updates"] == 1
    losses = [line["train/loss"] for line in lines_of(tmp_path / "run") if "train/loss" in line]
    assert len(losses) == 8
    assert losses.count(None) == 1
    assert 2 <= losses.index(None) < 4, "in the second epoch"
    assert results_of(tmp_path / "run")["train_loss"] == pytest.approx(sum(x for x in losses if x is not None) / 7)
    before, after = (
        load_file(tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "trained.safetensors") for step in (7, 8)
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_an_update_that_is_left_out_changes_no_weight(
    vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(vit, photos, tmp_path / "run", {1}, monkeypatch, "--max_train_steps", 4, "--save_total_limit", 9)
    trained = [
        load_file(tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "trained.safetensors") for step in range(1, 5)
    ]
    same = [all(one[name].equal(other[name]) for name in one) for one, other in pairwise(trained)]
    losses = [line["train/loss"] for line in lines_of(tmp_path / "run") if "train/loss" in line]
    assert same == [loss is None for loss in losses[1:]]
    assert same.count(True) == 1


@pytest.mark.parametrize(("limit", "step"), [(1, 2), (2, 3)])
def test_the_last_one_allowed_in_a_row_stops_the_run(
    limit: int,
    step: int,
    vit: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One update an epoch, and after two of them every one is bad."""
    more = ("--per_device_train_batch_size", 27, "--max_nonfinite_updates", limit, "--max_train_steps", 9)
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        _run(vit, photos, run, set(range(2, 9)), monkeypatch, *more, "--num_train_epochs", 9)
    assert end.value.code == 1
    said = capfd.readouterr().err
    assert (
        f"the loss of update {step + 1} is not finite. --resume_from_checkpoint auto resumes from update {step}. "
        in said
    )
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert newest.name == f"step-{step:08d}"
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "trained.safetensors").values())
    _run(vit, photos, run, set(), monkeypatch, *more, "--num_train_epochs", 9, "--resume_from_checkpoint", "auto")
    assert results_of(run)["skipped_updates"] == limit - 1


@pytest.mark.parametrize("precision", ["fp16", "no"])
def test_a_run_that_stops_in_fp16_advises_bf16(
    precision: str,
    vit: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A CPU cannot train in fp16: the run takes itself for one once its model is prepared."""
    original = loop.set_training

    def set_training(model: torch.nn.Module) -> None:
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", precision)
        original(model)

    monkeypatch.setattr(loop, "set_training", set_training)
    with pytest.raises(SystemExit):
        _run(vit, photos, tmp_path / "run", {0, 1, 2}, monkeypatch, "--max_nonfinite_updates", 1)
    said = capfd.readouterr().err
    assert "is not finite. --resume_from_checkpoint auto resumes from update 0. " in said
    assert ("use --mixed_precision bf16" in said) == (precision == "fp16")
