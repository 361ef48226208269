"""What a run knows of itself goes into a checkpoint and comes back to the bit, or is refused in words."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.tiny import perturb
from torch.nn.functional import cross_entropy

from lora_dist.engines.engine import Engine, make_engine
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import load_base
from lora_dist.model.lora.trainable import make_trainable, set_training
from lora_dist.processes.runtime import launch
from lora_dist.settings.train import LoraSettings, ModelSettings, OptimizationSettings
from lora_dist.training.optimizer import make_optimizer
from lora_dist.training.progress import Progress
from lora_dist.training.saving import checkpoint
from lora_dist.training.saving.checkpointer import KEPT_IN_MEMORY, Checkpointer

IDENTITY = {"base": "1234", "seed": 42, "effective_batch": 512}


def engine(vit: Path, moved: bool = False, **lora: Any) -> Engine:
    settings = OptimizationSettings(mixed_precision="no")
    base = load_base(str(vit), ["a", "b", "c"])
    model = make_trainable(base, ModelSettings(), LoraSettings(**({"lora_r": 4, "lora_dropout": 0.0} | lora)))
    if moved:
        perturb(model, scale=0.1)
    return make_engine(launch("no"), model, make_optimizer(model, settings, 16.0, []), settings)


def train(one: Engine, updates: int, seed: int = 0) -> list[float]:
    """Updates on random images, and their losses."""
    set_training(one.model)
    losses = []
    for number in range(updates):
        pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed + number))
        one.begin_update(1e-2)
        logits = one.model(pixel_values=pixels.to(one.accelerator.device)).logits
        loss = cross_entropy(logits, torch.tensor([0, 1, 2, 0], device=logits.device))
        one.backward(loss)
        one.step(one.clip_gradient(1.0).tolist())
        losses.append(float(loss.detach()))
    return losses


def checkpointer(root: Path, one: Engine, **changed: Any) -> Checkpointer:
    return Checkpointer(root, one, IDENTITY | changed, keep=2)


def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(vit: Path, tmp_path: Path) -> None:
    """Moments and their counts included: without them the next updates would be larger."""
    whole = engine(vit)
    train(whole, 3)
    progress = Progress(step=3, best_step=3, best_value=0.5, samples=12, loss_sum=0.1 + 0.2, train_seconds=1.5)
    checkpointer(tmp_path, whole).save(progress)
    expected = train(whole, 3, seed=50)

    resumed = engine(vit)
    train(resumed, 1, seed=99)
    found = checkpoint.read_newest(tmp_path)
    assert found is not None
    assert checkpointer(tmp_path, resumed).restore(found[1]) == progress
    assert train(resumed, 3, seed=50) == expected
    for mine, theirs in (
        (resumed.trainable_state(), whole.trainable_state()),
        (resumed.optimizer_state(), whole.optimizer_state()),
    ):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_a_checkpoint_before_the_first_update_is_a_start(vit: Path, tmp_path: Path) -> None:
    whole, resumed = engine(vit), engine(vit)
    checkpointer(tmp_path, whole).save(Progress())
    checkpointer(tmp_path, resumed).restore(checkpoint.read(checkpoint.path_of(tmp_path, 0)))
    assert train(resumed, 2) == train(whole, 2)


def test_a_checkpoint_holds_what_trains_and_not_the_base(vit: Path, tmp_path: Path) -> None:
    one = engine(vit)
    train(one, 1)
    checkpointer(tmp_path, one).save(Progress(step=1))
    content = checkpoint.read(checkpoint.path_of(tmp_path, 1))
    trained = {name for name, parameter in one.unwrapped.named_parameters() if parameter.requires_grad}
    assert content.trained.keys() == trained
    assert content.optimizer.keys() == {
        f"{moment}/{name}" for name in trained for moment in ("exp_avg", "exp_avg_sq", "step")
    }


@pytest.mark.parametrize(("name", "value"), [("seed", 43), ("base", "other"), ("effective_batch", 256)])
def test_another_runs_checkpoint_is_refused_with_what_differs(
    name: str, value: object, vit: Path, tmp_path: Path
) -> None:
    one = engine(vit)
    checkpointer(tmp_path, one).save(Progress())
    content = checkpoint.read(checkpoint.path_of(tmp_path, 0))
    with pytest.raises(UserError, match=f"{name} was {IDENTITY[name]} and is now {value}"):
        checkpointer(tmp_path, one, **{name: value}).restore(content)


@pytest.mark.parametrize("before", [{"torch": "1.0", "peft": "0.0"}, None], ids=["others", "not written down"])
def test_a_checkpoint_of_other_releases_is_gone_on_from_with_a_word(
    before: dict[str, str] | None, vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = engine(vit)
    checkpointer(tmp_path, one).save(Progress(step=1))
    content = checkpoint.read(checkpoint.path_of(tmp_path, 1))
    checkpointer(tmp_path, one).restore(content)
    assert "may differ" not in capsys.readouterr().err
    versions = content.state.pop("versions")
    if before:
        content.state["versions"] = versions | before
    assert checkpointer(tmp_path, one).restore(content) == Progress(step=1)
    said = capsys.readouterr().err
    assert ("the checkpoint was written with torch 1.0, peft 0.0, but this run uses" in said) == bool(before)
    assert ("may differ" in said) == bool(before)


@pytest.mark.parametrize("before", ["bf16", "no", None])
def test_another_precision_is_told(
    before: str | None, vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may come from the launch file, of which the settings know nothing. Older releases did not record it."""
    one = engine(vit)
    checkpointer(tmp_path, one).save(Progress(step=1))
    content = checkpoint.read(checkpoint.path_of(tmp_path, 1))
    assert content.state.pop("mixed_precision") == "no"
    if before is not None:
        content.state["mixed_precision"] = before
    checkpointer(tmp_path, one).restore(content)
    told = "trained with --mixed_precision bf16, and this run uses no" in capsys.readouterr().err
    assert told == (before == "bf16")


def test_a_checkpoint_of_other_targets_is_refused(vit: Path, tmp_path: Path) -> None:
    checkpointer(tmp_path, engine(vit)).save(Progress())
    content = checkpoint.read(checkpoint.path_of(tmp_path, 0))
    other = engine(vit, lora_target_modules=["query"])
    with pytest.raises(UserError, match=r"other names or shapes.*v_proj\.lora_A"):
        checkpointer(tmp_path, other).restore(content)


@pytest.mark.parametrize("rank", [1, 8])
def test_a_checkpoint_of_another_rank_is_refused(rank: int, vit: Path, tmp_path: Path) -> None:
    """A matrix of rank 1 would be broadcast into one of rank 4 without a word."""
    checkpointer(tmp_path, engine(vit, lora_r=rank)).save(Progress())
    content = checkpoint.read(checkpoint.path_of(tmp_path, 0))
    with pytest.raises(UserError, match="lora_A"):
        checkpointer(tmp_path, engine(vit)).restore(content)


@pytest.mark.parametrize("kept", [KEPT_IN_MEMORY, 0], ids=["memory", "disk"])
def test_the_best_weights_come_back_at_the_end(
    kept: int, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_dist.training.saving.checkpointer.KEPT_IN_MEMORY", kept)
    one = engine(vit)
    keeper = checkpointer(tmp_path, one)
    train(one, 1)
    best = one.trainable_state()
    progress = Progress(step=1, best_step=1, best_value=0.9)
    keeper.save(progress)
    for step in range(2, 6):
        train(one, 1, seed=step)
        progress.step = step
        keeper.save(progress)
    assert [path.name[-1] for path in checkpoint.listed(tmp_path)] == ["1", "4", "5"]
    keeper.restore_best(progress)
    assert all(torch.equal(tensor, best[name]) for name, tensor in one.trainable_state().items())


def test_a_run_that_goes_on_has_the_best_weights_of_before_in_memory(vit: Path, tmp_path: Path) -> None:
    before, after = engine(vit, moved=True), engine(vit)
    keeper, best = checkpointer(tmp_path, before), before.trainable_state()
    keeper.save(Progress(step=1, best_step=1, best_value=0.9))
    train(before, 1)
    keeper.save(Progress(step=2, best_step=1, best_value=0.9))
    resumed = checkpointer(tmp_path, after)
    progress = resumed.restore(checkpoint.read(checkpoint.path_of(tmp_path, 2)))
    shutil.rmtree(tmp_path)
    resumed.restore_best(progress)
    assert all(torch.equal(tensor, best[name]) for name, tensor in after.trainable_state().items())


def test_the_best_weights_that_could_not_be_saved_outlive_the_next_save(vit: Path, tmp_path: Path) -> None:
    one = engine(vit, moved=True)
    keeper, best = checkpointer(tmp_path / "there", one), one.trainable_state()
    (tmp_path / "there").write_text("no directory", encoding="utf-8")
    keeper.save(Progress(step=1, best_step=1, best_value=0.9))
    train(one, 1)
    (tmp_path / "there").unlink()
    progress = Progress(step=2, best_step=1, best_value=0.9)
    keeper.save(progress)
    keeper.restore_best(progress)
    assert all(torch.equal(tensor, best[name]) for name, tensor in one.trainable_state().items())


@pytest.mark.parametrize("best_step", [None, 2])
def test_the_last_weights_stay_where_they_are_the_best_or_none_is_known(
    best_step: int | None, vit: Path, tmp_path: Path
) -> None:
    one = engine(vit, moved=True)
    before = one.trainable_state()
    checkpointer(tmp_path, one).restore_best(Progress(step=2, best_step=best_step))
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.trainable_state().items())


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda path: (path / checkpoint.TRAINED).write_bytes(b"")])
def test_a_best_checkpoint_that_is_gone_or_damaged_is_looked_for_anew(
    damage: Any, vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = engine(vit)
    keeper = checkpointer(tmp_path, one)
    keeper.save(Progress(step=1))
    keeper.save(Progress(step=2, best_step=1, best_value=0.9))
    damage(checkpoint.path_of(tmp_path, 1))
    progress = keeper.restore(checkpoint.read(checkpoint.path_of(tmp_path, 2)))
    assert (progress.step, progress.best_step, progress.best_value) == (2, None, None)
    assert "the best checkpoint (update 1)" in capsys.readouterr().err
