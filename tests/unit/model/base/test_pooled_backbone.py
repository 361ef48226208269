"""Backbones without a head: pooled features and a linear layer, trained, saved, loaded and merged."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.backbones import BACKBONES, TOWERS, make_backbone
from lora_dist_testing.launching import environment
from lora_dist_testing.tiny import make_image, make_model, perturb
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, BeitConfig, BertConfig, BlipVisionModel, ViTImageProcessor
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.deployment.export.merge import merge_to
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import Base, BaseOptions, load_base
from lora_dist.model.base.head import EMPTY_FINGERPRINT
from lora_dist.model.lora.trainable import make_trainable, set_training
from lora_dist.model.trained.bundle import write_adapter, write_model
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.settings.train import LoraSettings, ModelSettings

LABELS = ["x", "y", "z"]
LORA = LoraSettings(lora_r=4, lora_dropout=0.0)
POOLED = ("dinov3_vit", "dinov3_convnext", "radio", "aimv2", "aimv2_without_pooler", "pixio", "sam_vision")
WITHOUT_CHECKPOINTING = ("dinov3_convnext",)


def _pixels(base: Base) -> Tensor:
    return ImageTransforms(base.processor).batch([make_image(label, 0) for label in range(3)])


def _logits(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=pixels).logits


def _gradients(model: nn.Module, base: Base) -> dict[str, Tensor]:
    set_training(model)
    torch.manual_seed(0)
    cross_entropy(model(pixel_values=_pixels(base)).logits, torch.arange(3)).backward()
    return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each kind, in a directory of its name."""
    return make_backbone(tmp_path_factory.mktemp("backbones") / request.param, request.param)


def test_the_checkpoint_of_a_backbone_is_loaded_whole(backbone: Path) -> None:
    base = load_base(str(backbone), LABELS)
    assert base.heads == ["classifier"]
    assert sorted(base.missing) == ["classifier.bias", "classifier.weight"]
    assert base.fingerprint != EMPTY_FINGERPRINT
    assert base.fingerprint == load_base(str(backbone), ["a", "b"], BaseOptions(seed=7)).fingerprint
    assert _logits(base.model, _pixels(base)).shape == (3, 3)
    if backbone.name == "vit_mae":
        assert torch.equal(_logits(base.model, _pixels(base)), _logits(base.model, _pixels(base))), "patches are masked"
        return
    kind = BlipVisionModel if backbone.name == "blip_vision" else AutoModel
    expected = kind.from_pretrained(backbone).eval()
    with torch.no_grad():
        found, wanted = (model(_pixels(base)) for model in (base.model.backbone.eval(), expected))
    assert torch.equal(found["last_hidden_state"], wanted["last_hidden_state"])


@pytest.mark.parametrize("tuning", ["lora", "head", "full"])
def test_a_backbone_trains_and_comes_back(backbone: Path, tmp_path: Path, tuning: Any) -> None:
    base = load_base(str(backbone), LABELS)
    model = make_trainable(base, ModelSettings(tuning=tuning), LORA)
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert _gradients(model, base).keys() == training
    assert any(".lora_A." in name for name in training) == (tuning == "lora")
    perturb(model)
    expected = _logits(model, _pixels(base))
    if tuning == "full":
        write_model(tmp_path / "result", model, base.processor, "card\n")
    else:
        write_adapter(tmp_path / "result", model, base, "card\n")
    found = load_classifier(tmp_path / "result")
    torch.testing.assert_close(_logits(found.model, _pixels(base)), expected)
    if tuning == "full":
        again = load_base(str(tmp_path / "result"), LABELS)
        assert again.missing == []


def test_gradient_checkpointing_gives_the_same_gradients(backbone: Path) -> None:
    settings = ModelSettings(gradient_checkpointing=True)
    base = load_base(str(backbone), LABELS)
    if backbone.name in WITHOUT_CHECKPOINTING:
        with pytest.raises(UserError, match="gradient_checkpointing"):
            make_trainable(base, settings, LORA)
        return
    model = make_trainable(base, settings, LORA)
    perturb(model, scale=0.05)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    plain_base = load_base(str(backbone), LABELS)
    plain = make_trainable(plain_base, ModelSettings(), LORA)
    perturb(plain, scale=0.05)
    found, expected = _gradients(model, base), _gradients(plain, plain_base)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("name", POOLED)
def test_the_features_are_those_of_the_pooling(name: str, tmp_path: Path) -> None:
    directory = make_backbone(tmp_path, name)
    own = AutoModel.from_pretrained(directory).eval()
    patches = {"dinov3_convnext": 1}.get(name, 16)
    for pooling in ("pooler", "class_token", "mean"):
        try:
            base = load_base(str(directory), LABELS, BaseOptions(pooling=pooling))
        except UserError as error:
            assert "no pooler" in str(error) or "no class token" in str(error)  # noqa: PT017
            lacking = {"aimv2_without_pooler": ("pooler", "class_token"), "sam_vision": ("pooler", "class_token")}
            lacking |= dict.fromkeys(("aimv2", "dinov3_convnext"), ("class_token",))
            assert pooling in lacking.get(name, ())
            continue
        assert base.pooling == pooling
        with torch.no_grad():
            outputs = own(_pixels(base))
        tokens = outputs["last_hidden_state"]
        if tokens.dim() == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        features = {
            "pooler": outputs["summary"] if name == "radio" else outputs.get("pooler_output"),
            "class_token": tokens[:, 0],
            "mean": tokens[:, -patches:].mean(dim=1),
        }[pooling]
        expected = base.model.classifier(features)
        torch.testing.assert_close(_logits(base.model, _pixels(base)), expected.detach())


def test_the_default_is_the_pooler_or_else_the_mean(tmp_path: Path) -> None:
    for name, pooling in (("dinov3_vit", "pooler"), ("radio", "pooler"), ("aimv2_without_pooler", "mean")):
        assert load_base(str(make_backbone(tmp_path / name, name)), LABELS).pooling == pooling
    assert load_base(str(make_model(tmp_path / "vit")), LABELS).pooling is None


@pytest.mark.parametrize("name", TOWERS)
def test_pooling_takes_the_vision_tower_of_two(name: str, tmp_path: Path) -> None:
    """That of BLIP and GroupViT is none of `AutoModel`, and GroupViT's has a module of the name of the tower."""
    directory = make_backbone(tmp_path, name)
    assert load_base(str(directory), LABELS).pooling == ("pooler" if name in ("blip", "groupvit") else None)
    base = load_base(str(directory), LABELS, BaseOptions(pooling="pooler"))
    assert not any("text" in parameter for parameter, _ in base.model.named_parameters())
    assert sorted(base.missing) == ["classifier.bias", "classifier.weight"]


def test_pooling_replaces_the_classifier_of_a_model_that_has_one(tmp_path: Path) -> None:
    base = load_base(str(make_model(tmp_path)), LABELS, BaseOptions(pooling="mean"))
    assert sorted(base.missing) == [
        "backbone.pooler.dense.bias",
        "backbone.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    ]
    assert base.model.config.prefix_tokens == 1


def test_the_tables_of_positions_are_no_meta_tensors_afterwards(tmp_path: Path) -> None:
    """BEiT caches its table by the size of the window alone."""
    config = BeitConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=40,
        patch_size=8,
        use_relative_position_bias=True,
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 40, "width": 40}).save_pretrained(tmp_path)
    load_base(str(tmp_path), LABELS, BaseOptions(pooling="mean"))
    assert BeitRelativePositionBias.generate_relative_position_index((5, 5)).device.type == "cpu"


def test_a_bundle_records_the_pooling(tmp_path: Path) -> None:
    """The default of a later release may be another one."""
    base = load_base(str(make_backbone(tmp_path / "base", "dinov3_vit")), LABELS, BaseOptions(pooling="mean"))
    model = make_trainable(base, ModelSettings(), LORA)
    perturb(model)
    write_adapter(tmp_path / "adapter", model, base, "card\n")
    assert json.loads((tmp_path / "adapter" / "base_model.json").read_text())["pooling"] == "mean"
    assert load_classifier(tmp_path / "adapter").model.get_base_model().config.pooling == "mean"


@pytest.mark.parametrize("name", ["dinov3_convnext", "radio", "clip_vision", "vit_mae", "siglip", "blip", "vit"])
def test_a_merged_backbone_is_a_plain_checkpoint(name: str, tmp_path: Path) -> None:
    """Also of a base whose weights have a prefix, which is taken away."""
    make = make_model(tmp_path / "base") if name == "vit" else make_backbone(tmp_path / "base", name)
    base = load_base(str(make), LABELS, BaseOptions(pooling="pooler" if name in ("siglip", "vit") else None))
    model = make_trainable(base, ModelSettings(), LORA)
    perturb(model)
    expected = _logits(model, _pixels(base))
    write_adapter(tmp_path / "adapter", model, base, "card\n")
    merge_to(load_classifier(tmp_path / "adapter"), "test", tmp_path / "merged", [], 1e-3)
    found = load_classifier(tmp_path / "merged")
    torch.testing.assert_close(_logits(found.model, _pixels(base)), expected, rtol=1e-3, atol=1e-4)
    assert (tmp_path / "merged" / "pooled_backbone.py").is_file() == (name != "vit_mae")


def test_what_takes_no_images_is_refused_in_a_sentence(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no image classifier of type bert, and its backbone cannot be used") as caught:
        load_base(str(tmp_path), LABELS)
    assert len(str(caught.value)) < 400


def test_a_backbone_that_joins_the_images_of_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"logits of shape \[1, 3\] for two images, not \[2, 3\]"):
        load_base(str(make_backbone(tmp_path, "pixtral")), LABELS)


_WITHOUT_LORA_DIST = """
import sys

import torch
from peft import PeftModel
from transformers import AutoImageProcessor, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from PIL import Image

base, adapter, merged, image = sys.argv[1:]
module = "pooled_backbone.PooledBackbone"
config = get_class_from_dynamic_module(f"{module}Config", adapter).from_pretrained(adapter)
model_class = get_class_from_dynamic_module(f"{module}ForImageClassification", adapter)
model = PeftModel.from_pretrained(model_class.from_pretrained(base, config=config), adapter).eval()
inputs = AutoImageProcessor.from_pretrained(adapter)(Image.open(image), return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits.softmax(-1)[0].tolist())
scores = {row["label"]: row["score"] for row in pipeline("image-classification", merged, trust_remote_code=True)(image)}
assert "lora_dist" not in sys.modules
print([scores[name] for name in "xyz"])
import lora_dist.model.base.classifier_config
scores = {row["label"]: row["score"] for row in pipeline("image-classification", merged)(image)}
print([scores[name] for name in "xyz"])
"""


@pytest.mark.parametrize("name", ["dinov3_vit"])
def test_others_load_the_adapter_and_the_merged_model(name: str, tmp_path: Path) -> None:
    """PEFT and `pipeline`, by the lines of docs/backbones.md."""
    directory = make_backbone(tmp_path / "base", name)
    base = load_base(str(directory), LABELS)
    model = make_trainable(base, ModelSettings(), LORA)
    perturb(model)
    write_adapter(tmp_path / "adapter", model, base, "card\n")
    make_image(1, 0).save(tmp_path / "image.png")
    classifier = load_classifier(tmp_path / "adapter")
    expected = _logits(model, ImageTransforms(base.processor).batch([make_image(1, 0)])).softmax(-1)[0].tolist()
    merge_to(classifier, "test", tmp_path / "merged", [], 1e-3)
    words = [
        sys.executable,
        "-c",
        _WITHOUT_LORA_DIST,
        *(str(tmp_path / part) for part in ("base", "adapter", "merged", "image.png")),
    ]
    run = subprocess.run(
        words, env=environment(HF_MODULES_CACHE=str(tmp_path / "modules")), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[0")]
    assert len(found) == 3
    for scores in found:
        assert scores == pytest.approx(expected, abs=1e-5)
