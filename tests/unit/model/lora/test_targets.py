"""What `--lora_target_modules auto` adapts, at the real sizes of models, on the meta device."""

import re
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import nn

from lora_dist.model.lora.depth import layer_positions
from lora_dist.model.lora.targets import is_mergeable, patterns, resolve_targets

QUERY_VALUE = {"q_proj", "v_proj"}
CASES: dict[str, tuple[Any, str, set[str], int]] = {
    "vit": (hf.ViTConfig, "ViTForImageClassification", QUERY_VALUE, 24),
    "swin": (hf.SwinConfig, "SwinForImageClassification", QUERY_VALUE, 24),
    "segformer": (hf.SegformerConfig, "SegformerForImageClassification", QUERY_VALUE, 16),
    "convnext": (hf.ConvNextConfig, "ConvNextForImageClassification", {"pwconv1", "pwconv2"}, 36),
    "levit": (hf.LevitConfig, "LevitForImageClassification", {"linear"}, 58),
    "cvt": (hf.CvtConfig, "CvtForImageClassification", {"projection_query", "projection_value"}, 26),
    "focalnet": (
        hf.FocalNetConfig,
        "FocalNetForImageClassification",
        {"projection_in", "projection_out", "fc1", "fc2"},
        48,
    ),
    "resnet": (hf.ResNetConfig, "ResNetForImageClassification", {"convolution"}, 53),
}


def _adapted(model: nn.Module, heads: list[str]) -> list[str]:
    targets = resolve_targets(model, ["auto"], heads)
    return [
        name for name, _ in model.named_modules() if any(re.search(rf"(^|\.){re.escape(t)}$", name) for t in targets)
    ]


@pytest.mark.parametrize("name", CASES)
def test_auto_adapts_attention_or_what_holds_most_weights(name: str) -> None:
    config, kind, last, count = CASES[name]
    with torch.device("meta"):
        model = getattr(hf, kind)(config())
    adapted = _adapted(model, ["classifier"])
    assert {one.rpartition(".")[2] for one in adapted} == last
    assert len(adapted) == count


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("vit_small_patch16_224", ["blocks.*.attn.qkv"]),
        ("convnext_tiny", ["stages.*.blocks.*.mlp.fc1", "stages.*.blocks.*.mlp.fc2"]),
        ("mixer_s16_224", [f"blocks.*.mlp_{kind}.fc{number}" for kind in ("tokens", "channels") for number in (1, 2)]),
    ],
)
def test_auto_with_models_of_timm(name: str, shown: list[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert patterns(_adapted(model, ["head"])) == shown


def test_only_layers_that_compute_with_their_weights_alone_are_mergeable() -> None:
    class Padded(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))

    class Renamed(nn.Linear):
        pass

    mergeable = [nn.Linear(2, 2), Renamed(2, 2), nn.Conv2d(2, 2, 3, stride=2, padding=1)]
    others = [
        Padded(2, 2, 3),
        nn.Conv2d(2, 2, 3, dilation=2),
        nn.Conv2d(2, 2, 3, groups=2),
        nn.Conv2d(2, 2, 3, padding_mode="reflect", padding=1),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        nn.utils.spectral_norm(nn.Linear(2, 2)),
        nn.Conv1d(2, 2, 1),
    ]
    assert all(is_mergeable(layer) for layer in mergeable)
    assert not any(is_mergeable(layer) for layer in others)


class _Gated(nn.Module):
    """Convolutions with squeeze-and-excitation, and a wide layer between pooling and the head."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="zeros" if plain else "circular")
        self.gate = nn.Conv2d(8, 8, 1)
        self.wide = nn.Linear(8, 512)
        self.head = nn.Linear(512, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        maps = self.conv(pixel_values)
        gated = maps * self.gate(maps.mean(dim=(2, 3), keepdim=True)).sigmoid()
        return self.head(self.wide(gated.mean(dim=(2, 3))))


@pytest.mark.parametrize("plain", [True, False])
def test_layers_after_pooling_do_not_decide_what_auto_adapts(plain: bool, caplog: pytest.LogCaptureFixture) -> None:
    """As the layer before CPUBone's classifier, and squeeze-and-excitation beside NFNet's own convolutions."""
    model = _Gated(plain)
    positions = layer_positions(model, torch.zeros(2, 3, 8, 8))
    assert positions == {"conv": 64, "gate": 1, "wide": 1, "head": 1}
    assert resolve_targets(model, ["auto"], ["head"], positions) == (["conv", "gate"] if plain else ["wide"])
    assert ("after pooling (gate, wide)" in caplog.text) != plain


class _WithTable(nn.Module):
    """A table of relative positions that layers compute from constants, and a query that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.arange(4.0)[:, None])
        self.table = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 4))
        self.start = nn.Parameter(torch.zeros(1, 4))
        self.ask = nn.Linear(4, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tokens = pixel_values.flatten(1)[:, :4] + self.table(self.offsets).mean(0)
        return self.mix(tokens) * self.ask(self.start)


def test_layers_that_compute_a_table_of_positions_get_no_lora() -> None:
    model = _WithTable().requires_grad_(False)
    positions = layer_positions(model, torch.zeros(2, 3, 8, 8))
    assert positions.keys() == {"ask", "mix"}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert resolve_targets(model, ["all-linear"], [], positions) == ["ask", "mix"]
