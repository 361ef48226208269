"""--image_size: interpolated embeddings, processors, and bundles and merged models that keep the size."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.architectures import make_checkpoint
from lora_dist_testing.backbones import make_backbone
from lora_dist_testing.processors import PROCESSORS
from lora_dist_testing.tiny import make_image, make_model, perturb
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    CLIPImageProcessor,
    PvtConfig,
    ViTImageProcessor,
    pipeline,
)

from lora_dist.data.pixels.transforms import ImageTransforms, output_size
from lora_dist.deployment.export.merge import merge_to
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import BaseOptions, load_base
from lora_dist.model.base.image_size import resize_model, resize_processor
from lora_dist.model.lora.trainable import make_trainable
from lora_dist.model.trained.adapter_set import load_adapter_set
from lora_dist.model.trained.bundle import write_adapter
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.model.trained.warm_start import load_warm_start
from lora_dist.settings.train import LoraSettings, ModelSettings, Settings

LABELS = ["x", "y", "z"]
LORA = LoraSettings(lora_r=4, lora_dropout=0.0)
WITH_FLAG = ("vit", "deit", "beit", "dinov2", "swin", "swinv2", "clip", "siglip")
"""Models with the argument `interpolate_pos_encoding`, or whose windows take any size."""


def _model(tmp_path: Path, name: str) -> Any:
    """A model whose embeddings, and tables of relative positions, matter."""
    directory = make_model(tmp_path / name, name)
    model = AutoModelForImageClassification.from_pretrained(directory)
    perturb(model, scale=0.3)
    return model.eval()


def _logits(model: nn.Module, pixels: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=pixels, **more).logits


@pytest.mark.parametrize("size", [(48, 48), (24, 24), (48, 32)])
@pytest.mark.parametrize("name", WITH_FLAG)
def test_a_resized_model_is_what_transformers_computes_in_each_pass(name: str, size: Any, tmp_path: Path) -> None:
    model = _model(tmp_path, name)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    if name in ("clip", "siglip") and size[0] != size[1]:
        with pytest.raises(
            UserError, match=r"cannot take images of 48 x 32 .*: its configuration has one .* square ones"
        ):
            resize_model(model, size)
        return
    resized = resize_model(model, size)
    torch.testing.assert_close(_logits(resized, pixels), _logits(model, pixels, interpolate_pos_encoding=True))
    fresh = type(resized)(copy.deepcopy(resized.config))
    tables = {name: tensor for name, tensor in fresh.named_buffers() if not tensor.is_floating_point()}
    assert all(torch.equal(tensor, resized.get_buffer(name)) for name, tensor in tables.items())
    shared = {tensor.data_ptr() for tensor in model.parameters()} & {
        tensor.data_ptr() for tensor in resized.parameters()
    }
    assert len(shared) >= len(list(model.parameters())) - 4, "weights were copied"


@pytest.mark.parametrize(
    "config",
    [
        BeitConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            use_relative_position_bias=True,
        ),
        PvtConfig(hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], image_size=32),
    ],
    ids=["beit", "pvt"],
)
def test_tables_and_embeddings_of_stages_are_resized(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    base = load_base(str(tmp_path), LABELS)
    perturb(base.model, scale=0.3)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    resized = resize_model(base.model, (64, 64))
    if config.model_type == "beit":
        torch.testing.assert_close(_logits(resized, pixels), _logits(base.model, pixels, interpolate_pos_encoding=True))
    changed = [
        name for name, tensor in base.model.named_parameters() if tensor.shape != resized.get_parameter(name).shape
    ]
    assert len(changed) == {"beit": 2, "pvt": 4}[config.model_type], changed
    again = resize_model(resized, (32, 32))
    assert all(again.get_parameter(name).shape == base.model.get_parameter(name).shape for name in changed)


@pytest.mark.parametrize("name", ["clip_vision", "aimv2", "siglip_vision", "dinov3_vit", "radio"])
def test_backbones_without_a_head_are_resized(name: str, tmp_path: Path) -> None:
    base = load_base(str(make_backbone(tmp_path, name)), LABELS, BaseOptions(image_size=(48, 48)))
    assert base.fingerprint == load_base(str(tmp_path), LABELS).fingerprint
    assert base.model.config.backbone_config.image_size == 48
    assert _logits(base.model, torch.randn(1, 3, 48, 48)).shape == (1, 3)


def test_what_cannot_be_resized_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--image_size: SamVisionModel cannot take images of 48 x 48 .*pos_embed"):
        load_base(str(make_backbone(tmp_path, "sam_vision")), LABELS, BaseOptions(image_size=(48, 48)))


@pytest.mark.parametrize("size", [(48, 48), (20, 20), (48, 40)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_processor_follows(name: str, size: Any) -> None:
    processor = PROCESSORS[name]()
    if name == "convnext" and size[0] != size[1]:
        with pytest.raises(UserError, match="ConvNextImageProcessor cannot make images of 48 x 40"):
            resize_processor(processor, size)
        return
    resized = resize_processor(processor, size)
    assert output_size(resized) == size
    assert type(resized).from_dict(resized.to_dict()).to_dict() == resized.to_dict()
    image = Image.new("RGB", (50, 60), (200, 10, 10))
    before, after = (ImageTransforms(one).evaluation(image) for one in (processor, resized))
    torch.testing.assert_close(before[:, 0, 0], after[:, 0, 0])


def test_the_margin_of_a_center_crop_stays() -> None:
    resized = resize_processor(CLIPImageProcessor(size={"shortest_edge": 256}, crop_size=224), (448, 448))
    assert resized.to_dict()["size"]["shortest_edge"] == 512


@pytest.mark.parametrize("size", [(48, 48), (48, 32)])
def test_the_size_travels_with_the_adapter_and_the_merged_model(size: Any, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "base")
    base = load_base(str(directory), LABELS, BaseOptions(image_size=size))
    assert base.fingerprint == load_base(str(directory), LABELS).fingerprint
    model = make_trainable(base, ModelSettings(), LORA)
    perturb(model)
    pixels = ImageTransforms(base.processor).batch([make_image(label, 0) for label in range(3)])
    assert pixels.shape[-2:] == size
    expected = _logits(model, pixels)
    write_adapter(tmp_path / "adapter", model, base, "card\n")
    assert json.loads((tmp_path / "adapter" / "base_model.json").read_text())["image_size"] == list(size)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        directory
    )
    classifier = load_classifier(tmp_path / "adapter")
    assert output_size(classifier.processor) == size
    torch.testing.assert_close(_logits(classifier.model, pixels), expected)
    merge_to(classifier, "test", tmp_path / "merged", [], 1e-3)
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(_logits(merged, pixels), expected, rtol=1e-3, atol=1e-4)


def test_training_goes_on_at_another_size(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "base")
    base = load_base(str(directory), LABELS, BaseOptions(image_size=(48, 48)))
    model = make_trainable(base, ModelSettings(), LORA)
    write_adapter(tmp_path / "adapter", model, base, "card\n")
    for given, expected in ((None, (48, 48)), ([64, 64], (64, 64))):
        more = {} if given is None else {"image_size": given}
        settings = Settings(model=ModelSettings(adapter_name_or_path=str(tmp_path / "adapter"), **more))
        settings, found, _ = load_warm_start(settings, LABELS)
        assert found.image_size == expected == output_size(found.processor)
        assert settings.model.input_size == expected


def test_the_size_of_the_base_is_no_change(tmp_path: Path) -> None:
    assert load_base(str(make_model(tmp_path)), LABELS, BaseOptions(image_size=(32, 32))).image_size is None


def test_random_weights_of_another_size(tmp_path: Path) -> None:
    base = load_base(str(make_model(tmp_path)), LABELS, BaseOptions(init_from_config=True, image_size=(64, 64)))
    assert base.model.config.image_size == 64


def test_adapters_of_several_sizes_do_not_share_a_base(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "base")
    adapters = {}
    for name, size in {"first": None, "second": (48, 48)}.items():
        base = load_base(str(directory), LABELS, BaseOptions(image_size=size))
        write_adapter(tmp_path / name, make_trainable(base, ModelSettings(), LORA), base, "card\n")
        adapters[name] = tmp_path / name
    with pytest.raises(UserError, match=r"a different --image_size \(None and \(48, 48\)\)"):
        load_adapter_set(adapters)


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
@pytest.mark.parametrize("name", ["timm vit", "timm eva02"])
def test_timm_resizes_its_embeddings(name: str, size: Any, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "base", name)
    expected = load_base(str(directory), LABELS)
    perturb(expected.model, scale=0.3)
    resized = resize_model(expected.model, size)
    expected.model.timm_model.set_input_size(img_size=size)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_logits(resized, pixels), _logits(expected.model, pixels))


@pytest.mark.parametrize("name", ["timm vit", "timm eva02", "timm swin", "timm efficientnet"])
def test_the_size_of_a_timm_model_travels(name: str, tmp_path: Path) -> None:
    size = (64, 96)
    directory = make_checkpoint(tmp_path / "base", name)
    base = load_base(str(directory), LABELS, BaseOptions(image_size=size))
    assert base.fingerprint == load_base(str(directory), LABELS).fingerprint
    model = make_trainable(base, ModelSettings(), LORA)
    perturb(model, scale=0.02)
    images = [make_image(label, 0, (90, 70)) for label in range(3)]
    pixels = ImageTransforms(base.processor).batch(images)
    assert pixels.shape[-2:] == size
    expected = _logits(model, pixels)
    write_adapter(tmp_path / "adapter", model, base, "card\n")
    classifier = load_classifier(tmp_path / "adapter")
    torch.testing.assert_close(ImageTransforms(classifier.processor).batch(images), pixels)
    torch.testing.assert_close(_logits(classifier.model, pixels), expected)
    merge_to(classifier, "test", tmp_path / "merged", [], 1e-3)
    classify = pipeline("image-classification", str(tmp_path / "merged"))
    for image, row in zip(images, expected.softmax(-1), strict=True):
        found = {one["label"]: one["score"] for one in classify(image)}
        torch.testing.assert_close(torch.tensor([found[label] for label in LABELS]), row, rtol=1e-3, atol=1e-4)


def test_a_timm_model_that_cannot_be_resized_says_so(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("levit_128s", num_classes=3)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    with pytest.raises(
        UserError, match=r"^--image_size: levit_128s cannot take images of 64 x 64 .*: size mismatch for"
    ):
        load_base(str(tmp_path), LABELS, BaseOptions(image_size=(64, 64)))


def test_a_timm_model_has_no_other_pooling(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "timm vit")
    with pytest.raises(UserError, match=r"a timm model has a head .* leave --pooling out$"):
        load_base(str(directory), LABELS, BaseOptions(pooling="pooler"))
