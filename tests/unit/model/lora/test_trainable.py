"""Layers that are not plain, in training: batch norms, layers that are not called, convolutions of their own kind."""

from pathlib import Path

import pytest
import torch
from lora_dist_testing.architectures import make_checkpoint
from lora_dist_testing.tiny import CLASSES, make_image
from torch import Tensor, nn

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import Base, load_base
from lora_dist.model.lora.trainable import load_trained, make_trainable, set_training, trained_tensors
from lora_dist.settings.train import LoraSettings, ModelSettings

LABELS = list(CLASSES)


def _base(name: str, directory: Path) -> Base:
    return load_base(str(make_checkpoint(directory / name, name)), LABELS)


def _pixels(base: Base, count: int) -> Tensor:
    return ImageTransforms(base.processor).batch([make_image(0, number) for number in range(count)])


def _norm(model: nn.Module) -> nn.BatchNorm1d:
    return next(
        module for module in model.modules() if isinstance(module, nn.BatchNorm1d) and module.weight.requires_grad
    )


def test_batch_norms_train_on_a_last_batch_of_one(tmp_path: Path) -> None:
    """LeViT's head has one value per channel for each image."""
    base = _base("levit", tmp_path)
    model = make_trainable(base, ModelSettings(tuning="head"), LoraSettings())
    set_training(model)
    norm, before = _norm(model), _norm(model).running_mean.clone()
    logits = model(pixel_values=_pixels(base, 1)).logits
    logits.sum().backward()
    assert norm.weight.grad is not None
    assert norm.training
    assert torch.equal(norm.running_mean, before)
    torch.testing.assert_close(logits, model.eval()(pixel_values=_pixels(base, 1)).logits)
    set_training(model)
    model(pixel_values=_pixels(base, 2))
    assert not torch.equal(norm.running_mean, before)


def test_loading_renews_what_a_model_keeps_of_its_weights(tmp_path: Path) -> None:
    """LeViT caches its position biases in evaluation."""
    full = ModelSettings(tuning="full")
    model, other = (make_trainable(_base("levit", tmp_path), full, LoraSettings()) for _ in range(2))
    for name, parameter in model.named_parameters():
        if "attention_biases" in name:
            nn.init.normal_(parameter)
            assert parameter.requires_grad
    set_training(model)
    pixels = _pixels(_base("levit", tmp_path), 2)
    other.eval()(pixel_values=pixels)
    load_trained(other, dict(trained_tensors(model)))
    assert not other.training
    torch.testing.assert_close(other(pixel_values=pixels).logits, model.eval()(pixel_values=pixels).logits)


def test_lora_that_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    """BiT standardises the weights of its convolutions in their `forward`."""
    base = _base("bit", tmp_path)
    for targets, message in (
        ("auto", r"Train with --tuning head or --tuning full"),
        ("conv1", r"cannot be merged there"),
    ):
        with pytest.raises(
            UserError, match=rf"WeightStandardizedConv2d computes with other weights.*{message}|{message}"
        ):
            make_trainable(base, ModelSettings(), LoraSettings(lora_target_modules=[targets]))
    for tuning in ("head", "full"):
        make_trainable(_base("bit", tmp_path), ModelSettings(tuning=tuning), LoraSettings())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
def test_models_whose_code_reads_from_layers_with_lora_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not run with LoRA: .*'stride'.*--tuning head or --tuning full"):
        make_trainable(_base(name, tmp_path), ModelSettings(), LoraSettings())
