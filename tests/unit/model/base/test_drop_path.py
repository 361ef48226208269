"""Stochastic depth (`--drop_path`): in training alone, where the architecture has it, and in no configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.architectures import make_checkpoint
from lora_dist_testing.backbones import make_backbone
from lora_dist_testing.tiny import make_model

from lora_dist.errors import UserError
from lora_dist.model.base.backbone import BaseOptions, load_base


def _rates(model: Any) -> list[float]:
    return [float(one.drop_prob) for one in model.modules() if type(one).__name__.endswith("DropPath")]


@pytest.mark.parametrize(
    "name", ["swin", "swinv2", "convnext", "beit", "dinov2", "segformer", "timm vit", "timm convnext"]
)
def test_the_rate_is_that_of_training_and_is_not_recorded(name: str, tmp_path: Path) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    path = make_checkpoint(tmp_path / "base", name)
    plain = load_base(str(path), ["x", "y"])
    base = load_base(str(path), ["x", "y"], BaseOptions(drop_path=0.5))
    assert max(_rates(base.model)) == pytest.approx(0.5)
    assert base.model.config.to_dict() == plain.model.config.to_dict()
    pixels = torch.randn(8, 3, 64, 64) if name == "segformer" else torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        expected = plain.model.eval()(pixel_values=pixels).logits
        torch.testing.assert_close(base.model.eval()(pixel_values=pixels).logits, expected)
        base.model.train()
        drawn = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            drawn.append(base.model(pixel_values=pixels).logits)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not any(_rates(load_base(str(path), ["x", "y"], BaseOptions(drop_path=0.0)).model))


def test_the_backbone_inside_and_another_image_size_have_the_rate(tmp_path: Path) -> None:
    pooled = load_base(
        str(make_backbone(tmp_path / "pooled", "dinov3_convnext")), ["x", "y"], BaseOptions(drop_path=0.5)
    )
    assert max(_rates(pooled.model)) == 0.5
    resized = load_base(
        str(make_model(tmp_path / "swin", "swin")), ["x", "y"], BaseOptions(drop_path=0.5, image_size=(64, 64))
    )
    assert max(_rates(resized.model)) == 0.5
    assert resized.model.config.drop_path_rate == 0.1
    pytest.importorskip("timm")
    timm_vit = str(make_checkpoint(tmp_path / "timm", "timm vit"))
    resized = load_base(timm_vit, ["x", "y"], BaseOptions(drop_path=0.5, image_size=(64, 64)))
    plain = load_base(timm_vit, ["x", "y"], BaseOptions(image_size=(64, 64)))
    assert max(_rates(resized.model)) == 0.5
    assert resized.model.config.to_dict() == plain.model.config.to_dict()


def test_a_timm_model_without_it_is_refused(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("dla46_c", num_classes=2)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    with pytest.raises(UserError, match="no stochastic depth; leave it out"):
        load_base(str(tmp_path), ["x", "y"], BaseOptions(drop_path=0.1))


@pytest.mark.parametrize(
    ("name", "why"),
    [("vit", "has no drop_path_rate"), ("cvt", "a rate for each stage"), ("levit", "is a whole number")],
)
def test_an_architecture_without_it_is_refused(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        load_base(str(make_checkpoint(tmp_path, name)), ["x", "y"], BaseOptions(drop_path=0.1))
