"""How far parameters are from the head: against written tables, against timm, and in the groups of the optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.tiny import make_config
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from lora_dist.errors import UserError
from lora_dist.model.base.backbone import Base, load_base
from lora_dist.model.lora import depth
from lora_dist.model.lora.trainable import make_trainable, parameter_steps
from lora_dist.settings.train import LoraSettings, ModelSettings, OptimizationSettings
from lora_dist.training.optimizer import make_optimizer

PIXELS = torch.zeros(1, 3, 32, 32)

VIT = {
    "vit.embeddings.cls_token": 3,
    "vit.embeddings.patch_embeddings.projection.weight": 3,
    "vit.layers.0.layernorm_before.weight": 2,
    "vit.layers.0.attention.q_proj.weight": 2,
    "vit.layers.1.mlp.fc2.bias": 1,
    "vit.layernorm.weight": 1,
    "classifier.weight": 0,
}
SWIN = {
    "swin.embeddings.patch_embeddings.projection.weight": 5,
    "swin.embeddings.norm.weight": 5,
    "swin.encoder.layers.0.blocks.0.attention.q_proj.weight": 4,
    "swin.encoder.layers.0.blocks.1.attention.q_proj.weight": 3,
    "swin.encoder.layers.0.downsample.reduction.weight": 2,
    "swin.encoder.layers.1.blocks.0.layernorm_before.weight": 2,
    "swin.encoder.layers.1.blocks.1.attention.q_proj.weight": 1,
    "swin.layernorm.bias": 1,
    "classifier.bias": 0,
}
CONVNEXT = {
    "convnext.embeddings.patch_embeddings.weight": 4,
    "convnext.embeddings.layernorm.weight": 4,
    "convnext.encoder.stages.0.layers.0.dwconv.weight": 3,
    "convnext.encoder.stages.1.downsampling_layer.1.weight": 2,
    "convnext.encoder.stages.1.layers.0.layer_scale_parameter": 2,
    "convnext.encoder.stages.1.layers.1.pwconv1.weight": 1,
    "convnext.layernorm.weight": 1,
    "classifier.weight": 0,
}


@pytest.mark.parametrize(
    ("architecture", "changes", "table"),
    [
        ("vit", {}, VIT),
        ("swin", {"depths": [2, 2]}, SWIN),
        ("convnext", {"depths": [1, 2]}, CONVNEXT),
    ],
    ids=["vit", "swin", "convnext"],
)
def test_the_steps_are_those_of_the_table(architecture: str, changes: dict[str, Any], table: dict[str, int]) -> None:
    config = make_config(architecture)
    config.update(changes)
    model = AutoModelForImageClassification.from_config(config).eval()
    steps = depth.steps_from_head(model, ["classifier"], PIXELS)
    assert steps.keys() == dict(model.named_parameters()).keys()
    assert {name: steps[name] for name in table} == table


TIMM: list[tuple[str, dict[str, Any], str]] = [
    ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}, "head"),
    ("convnext_tiny", {"depths": [1, 2, 2, 1], "dims": [8, 16, 16, 32]}, "head"),
    (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]},
        "head",
    ),
    ("resnet18", {}, "fc"),
]


class _Called(nn.Module):
    """A model of timm, called as those of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values)


@pytest.mark.parametrize(("name", "arguments", "head"), TIMM, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_found_by_structure_is_what_timm_says(name: str, arguments: dict[str, Any], head: str) -> None:
    """Of architectures for which timm has a table: stages, blocks, and what comes between them."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=3, **arguments).eval()
    layers = timm.models.group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    called = _Called(model)
    calls = depth.first_calls(called, PIXELS)
    blocks = depth._blocks(called, [f"model.{head}"], calls, "layer_decay")
    found = {name: depth._steps(f"model.{name}", [f"model.{head}"], blocks, calls) for name in layers}
    assert found == {name: max(layers.values()) - layer for name, layer in layers.items()}


def _timm_base(directory: Path, name: str, arguments: dict[str, Any]) -> Base:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=2, **arguments)
    model.pretrained_cfg |= {"input_size": (3, 32, 32), "num_classes": 2}
    timm.models.save_for_hf(model, directory, model_args=arguments, safe_serialization=True)
    return load_base(str(directory), ["x", "y"])


def test_the_groups_of_a_timm_model_are_those_of_timm(tmp_path: Path) -> None:
    base = _timm_base(tmp_path, *TIMM[0][:2])
    steps = parameter_steps(base)
    model: Any = make_trainable(base, ModelSettings(tuning="full"), LoraSettings())
    settings = OptimizationSettings(weight_decay=0.05, layer_decay=0.75)
    optimizer = make_optimizer(model, settings, 1.0, base.heads, steps)
    from timm.optim import param_groups_layer_decay

    expected = param_groups_layer_decay(model.timm_model, weight_decay=0.05, layer_decay=0.75)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def by_name(groups: Any, scale: str) -> dict[str, tuple[float, float]]:
        return {names[id(one)]: (group[scale], group["weight_decay"]) for group in groups for one in group["params"]}

    found, wanted = by_name(optimizer.param_groups, "lr_ratio"), by_name(expected, "lr_scale")
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values), name
    assert len({scale for scale, _ in wanted.values()}) == 5


def test_where_timm_has_no_groups_they_follow_the_structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in PiT and PoolFormer v2."""
    base = _timm_base(tmp_path, *TIMM[0][:2])
    expected = parameter_steps(base)
    monkeypatch.delattr(type(base.model.timm_model), "group_matcher")
    assert parameter_steps(base) == expected


def test_lora_in_a_block_trains_at_the_rate_of_the_block(vit: Path) -> None:
    """With the rates of LoRA+ and of the head; DoRA's magnitudes, norms and biases too."""
    base = load_base(str(vit), ["x", "y", "z"])
    steps = parameter_steps(base)
    lora = LoraSettings(lora_r=4, use_dora=True, train_norms=True, lora_bias="lora_only")
    model = make_trainable(base, ModelSettings(), lora)
    settings = OptimizationSettings(learning_rate=0.01, head_learning_rate=0.03, layer_decay=0.5)
    ratios = {
        id(parameter): group["lr_ratio"]
        for group in make_optimizer(model, settings, 16.0, base.heads, steps).param_groups
        for parameter in group["params"]
    }
    expected = {
        "vit.layers.0.attention.q_proj.lora_A.default.weight": 0.25,
        "vit.layers.0.attention.q_proj.lora_B.default.weight": 4.0,
        "vit.layers.0.attention.q_proj.base_layer.bias": 0.25,
        "vit.layers.1.attention.v_proj.lora_magnitude_vector.default.weight": 0.5,
        "vit.layers.0.layernorm_after.modules_to_save.default.weight": 0.25,
        "vit.layernorm.modules_to_save.default.bias": 0.5,
        "classifier.modules_to_save.default.weight": 3.0,
    }
    for name, ratio in expected.items():
        assert ratios[id(model.get_parameter(f"base_model.model.{name}"))] == pytest.approx(ratio), name
    assert len(ratios) == sum(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_blocks_is_refused() -> None:
    config = make_config("vit")
    config.num_hidden_layers = 0
    model = AutoModelForImageClassification.from_config(config).eval()
    with pytest.raises(UserError, match="--layer_decay: ViTForImageClassification has no numbered list of blocks"):
        depth.steps_from_head(model, ["classifier"], PIXELS)
