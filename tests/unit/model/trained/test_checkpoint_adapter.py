"""An adapter made of a checkpoint gives the logits of the checkpoint's weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.old_adapters import logits
from lora_dist_testing.tiny import make_image, perturb, write_bundle

import lora_dist
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import load_base
from lora_dist.model.lora.adapters import mutates_base, save_adapter
from lora_dist.model.lora.trainable import host_copy, load_trained, make_trainable, trained_tensors
from lora_dist.model.trained.bundle import Records, write_adapter
from lora_dist.model.trained.checkpoint_adapter import is_checkpoint, write_adapter_of_checkpoint
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.model.trained.temperature import Calibration
from lora_dist.settings.train import LoraSettings, ModelSettings
from lora_dist.training.saving import checkpoint
from lora_dist.training.saving.checkpoint import Checkpoint

LABELS = ["x", "y", "z"]


def _trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: host_copy(tensor) for name, tensor in trained_tensors(model)}


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize(
    ("tuning", "lora"),
    [
        ("lora", {"lora_r": 4}),
        ("lora", {"lora_r": 4, "use_dora": True}),
        ("lora", {"lora_r": 4, "init_lora_weights": "pissa"}),
        ("lora", {"lora_r": 4, "lora_bias": "all"}),
        ("head", {}),
    ],
    ids=str,
)
def test_an_adapter_of_a_checkpoint_has_its_logits(
    tuning: Any, lora: dict[str, Any], averaged: bool, vit: Path, tmp_path: Path
) -> None:
    base = load_base(str(vit), LABELS)
    model = make_trainable(base, ModelSettings(tuning=tuning), LoraSettings(**lora))
    initial = tmp_path / "adapter_init" if mutates_base(model) else None
    if initial is not None:
        save_adapter(model, initial)
    perturb(model, 1, 0.2)
    expected, weights = logits(model.eval(), 32), _trained(model)
    perturb(model, 2, 0.2)
    others = _trained(model)
    content = (
        Checkpoint(others, {}, {}, average=weights) if averaged else Checkpoint(weights, {"m/x": torch.ones(1)}, {})
    )
    path = checkpoint.write(tmp_path / "checkpoints", 7, content)
    load_trained(model, others)
    write_adapter(tmp_path / "adapter", model, base, "card\n", initial)
    assert is_checkpoint(path)
    assert not is_checkpoint(tmp_path / "adapter")
    write_adapter_of_checkpoint(path, tmp_path / "made")
    torch.testing.assert_close(logits(load_classifier(tmp_path / "made").model, 32), expected, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "made" / "README.md").exists()


def test_only_the_checkpoint_of_the_result_has_its_temperature(
    vit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was fitted to the logits of these weights."""
    model, base = write_bundle(tmp_path / "adapter", vit, LABELS, lora_r=4)
    write_adapter(tmp_path / "adapter", model, base, "card\n", records=Records(calibration=Calibration(2.5)))
    paths = [checkpoint.write(tmp_path / "checkpoints", 7, Checkpoint(_trained(model), {}, {}))]
    perturb(model, 2, 0.2)
    paths.append(checkpoint.write(tmp_path / "checkpoints", 9, Checkpoint(_trained(model), {}, {})))
    for path, temperature in zip(paths, (2.5, 1), strict=True):
        assert "not calibrated" not in caplog.text
        write_adapter_of_checkpoint(path, tmp_path / path.name)
        assert load_classifier(tmp_path / path.name).calibration.temperature == temperature
    assert "not calibrated" in caplog.text


def test_a_checkpoint_is_loaded_from_python(vit: Path, tmp_path: Path) -> None:
    model, _ = write_bundle(tmp_path / "adapter", vit, LABELS, lora_r=4)
    path = checkpoint.write(tmp_path / "checkpoints", 7, Checkpoint(_trained(model), {}, {}))
    image = make_image(0, 0)
    assert lora_dist.load(path, device="cpu")(image) == lora_dist.load(tmp_path / "adapter", device="cpu")(image)


def test_a_checkpoint_without_a_result_or_a_whole_file_is_refused(vit: Path, tmp_path: Path) -> None:
    model, _ = write_bundle(tmp_path / "elsewhere", vit, LABELS)
    path = checkpoint.write(tmp_path / "checkpoints", 7, Checkpoint(_trained(model), {}, {}))
    with pytest.raises(UserError, match=r"there is no adapter in .*Let the run finish first"):
        write_adapter_of_checkpoint(path, tmp_path / "made")
    (path / "trained.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"trained\.safetensors is corrupt"):
        write_adapter_of_checkpoint(path, tmp_path / "made")
    assert not (tmp_path / "made").exists()
