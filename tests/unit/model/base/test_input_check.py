"""Image processors that do not fit their model or say something else than pixels, and those of timm."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from lora_dist_testing.architectures import make_checkpoint
from lora_dist_testing.edits import edit_json, edit_tensors
from lora_dist_testing.tiny import CLASSES, make_image, make_model, view_of
from transformers import (
    AutoImageProcessor,
    LlavaOnevisionImageProcessor,
    Siglip2ImageProcessor,
    TextNetImageProcessor,
    ViTConfig,
    ViTImageProcessor,
)
from transformers.modeling_outputs import ImageClassifierOutput

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import BaseOptions, load_base, load_base_of_run
from lora_dist.model.base.input_check import require_fit
from lora_dist.model.lora.injection import adapted_layers
from lora_dist.model.lora.trainable import make_trainable
from lora_dist.model.trained.bundle import write_adapter
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.model.trained.warm_start import load_warm_start
from lora_dist.settings.train import AugmentationSettings, LoraSettings, ModelSettings, Settings

LABELS = list(CLASSES)


PROCESSORS = [
    (ViTImageProcessor(size={"height": 48, "width": 40}), r"takes 3 x 32 x 32, and its image processor gives 3 x 48 x"),
    (Siglip2ImageProcessor(patch_size=8, max_num_patches=16), r"makes \[16, 192\] of an image, not \[3, height, width"),
    (
        LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 64]]),
        r"makes \[\d, 3, 32, 32\] of an image, not \[3, height, width\]; .* with --image_processor_name",
    ),
    (TextNetImageProcessor(size={"shortest_edge": 32}), r"keeps each image's own shape \(32 x 64 or 64 x 32\)"),
    (ViTImageProcessor(size={"longest_edge": 32}), r"ViTImageProcessor cannot prepare an RGB image: .*Size must"),
    (
        ViTImageProcessor(size={"height": 32, "width": 32}, image_std=[0.5, 0.0, 0.5]),
        r"ViTImageProcessor makes values of an image that are not finite: correct image_mean and image_std",
    ),
]


@pytest.mark.parametrize(
    ("processor", "message"), PROCESSORS, ids=["size", "patches", "crops", "own shape", "edge", "no deviation"]
)
def test_a_processor_that_does_not_fit_is_said_when_the_base_is_loaded(
    processor: ViTImageProcessor, message: str, tmp_path: Path
) -> None:
    directory = make_model(tmp_path)
    processor.save_pretrained(directory)
    with pytest.raises(UserError, match=message) as raised:
        load_base(str(directory), LABELS)
    assert "\n" not in str(raised.value)


def test_a_model_of_other_channels_is_refused(tmp_path: Path) -> None:
    model = load_base(str(make_model(tmp_path)), LABELS).model
    model.config.num_channels = 1
    type(model)(model.config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"takes 1 x 32 x 32, and its image processor gives 3 x 32 x 32"):
        load_base(str(tmp_path), LABELS)


class _Model(torch.nn.Module):
    config = ViTConfig(num_labels=3)


class _TwoHeads(_Model):
    """As `TimmWrapperForImageClassification` of Inception v3 with `aux_logits`."""

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        logits = torch.zeros(len(pixel_values), 3)
        return ImageClassifierOutput(logits=(logits, logits))


class _OwnClasses(_Model):
    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=torch.zeros(len(pixel_values), 7))


class _OtherInput(_Model):
    def forward(self, images: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=torch.zeros(len(images), 3))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_TwoHeads(), r"returns 2 outputs in place of logits: turn its auxiliary head off, such as aux_logits"),
        (_OwnClasses(), r"returns logits of shape \[2, 7\] .*: take a base model whose head follows num_labels"),
        (_OtherInput(), r"Take a base model whose forward pass takes pixel_values alone"),
    ],
)
def test_code_that_is_no_classifier_of_the_classes_is_refused(model: torch.nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        require_fit(model, ViTImageProcessor())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    make_model(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", lambda state: state["vit.layernorm.weight"].fill_(torch.nan))
    with pytest.raises(UserError, match="logits that are not finite for a black image"):
        load_base(str(tmp_path), LABELS)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (1, r"takes 1 x any x any, and its image processor gives 3 x 32 x 32: .*Take a base model for RGB images"),
        (4, r"TimmWrapperImageProcessor cannot prepare an RGB image: .*take a base model .* for RGB images"),
    ],
)
def test_a_timm_model_of_other_channels_is_refused(channels: int, message: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "timm resnet")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.setdefault("model_args", {})["in_chans"] = channels
    config["pretrained_cfg"] |= {"input_size": [channels, 32, 32], "mean": [0.5] * channels, "std": [0.5] * channels}
    path.write_text(json.dumps(config))
    timm.models.save_for_hf(
        timm.create_model("test_resnet", in_chans=channels, num_classes=2),
        tmp_path / "weights",
        safe_serialization=True,
    )
    (tmp_path / "weights" / "model.safetensors").replace(directory / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_base(str(directory), LABELS)


def test_models_of_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ImageGPTImageProcessor makes input_ids of an image, not pixel_values"):
        load_base(str(make_checkpoint(tmp_path, "imagegpt")), LABELS)


def test_evaluation_is_by_the_transforms_of_timm_and_training_normalises_as_they_do(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "timm resnet")
    processor = AutoImageProcessor.from_pretrained(directory)
    transforms = ImageTransforms(processor, AugmentationSettings())
    image = make_image(0, 0, (60, 50))
    config = json.loads((directory / "config.json").read_text())["pretrained_cfg"]
    expected = timm.data.create_transform(**timm.data.resolve_data_config(config))(image)
    assert torch.equal(transforms.evaluation(image), expected)
    assert torch.equal(transforms.finished(transforms.resized([image]))[0], expected)
    levels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32)).astype(np.uint8))
    mean, deviation = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(transforms._last_steps(levels), (levels / 255 - mean) / deviation, rtol=0, atol=1e-5)
    assert view_of(transforms, image, (0, 1)).shape == (3, 32, 32)


def test_a_checkpoint_that_timm_saved_is_a_base(tmp_path: Path) -> None:
    """timm writes the number of classes twice, and `transformers` refuses that."""
    directory = make_checkpoint(tmp_path, "timm vit")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.setdefault("model_args", {})["num_classes"] = 2
    path.write_text(json.dumps(config))
    base = load_base(str(directory), LABELS)
    assert base.heads == ["timm_model.head"]
    assert base.missing == ["timm_model.head.bias", "timm_model.head.weight"]


def test_an_architecture_that_timm_does_not_have_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """As of a release that is newer than the installed one."""
    directory = make_checkpoint(tmp_path, "timm resnet")
    edit_json(directory / "config.json", architecture="resnet_of_next_year")
    with pytest.raises(UserError, match="package that is not installed: pip install -U timm"):
        load_base(str(directory), LABELS)


def test_lora_goes_to_layers_that_are_called(tmp_path: Path) -> None:
    """EVA-02 reads the weights of `qkv` and does not call it."""
    base = load_base(str(make_checkpoint(tmp_path, "timm eva02")), LABELS)
    model = make_trainable(base, ModelSettings(), LoraSettings())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_B" in name for name in trained)
    assert not any("qkv" in name for name in trained)
    kinds = [f"timm_model.blocks.*.{name}" for name in ("attn.proj", "mlp.fc1", "mlp.fc2")]
    assert adapted_layers(model) == f"6 layers: {', '.join(kinds)}"


def test_a_base_without_an_image_processor_takes_another(tmp_path: Path) -> None:
    directory, other = make_model(tmp_path / "base"), tmp_path / "other"
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"has no image processor.*--image_processor_name"):
        load_base(str(directory), LABELS)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(other)
    named = ModelSettings(model_name_or_path=str(directory), image_processor_name=str(other))
    base = load_base_of_run(Settings(model=named), LABELS)
    write_adapter(tmp_path / "adapter", make_trainable(base, named, LoraSettings()), base, "card\n")
    classifier = load_classifier(tmp_path / "adapter")
    assert list(classifier.processor.image_mean) == [0.1, 0.2, 0.3]
    _, warm, _ = load_warm_start(Settings(model=ModelSettings(adapter_name_or_path=str(tmp_path / "adapter"))), LABELS)
    assert list(warm.processor.image_mean) == [0.1, 0.2, 0.3]


def test_timm_models_and_processors_go_together(tmp_path: Path) -> None:
    """A result of timm has no file for another processor, and would be read with its own."""
    base, plain = make_checkpoint(tmp_path / "timm", "timm vit"), make_model(tmp_path / "vit")
    mixed = {"timm's models have their own image processor": (base, plain), "fit timm's models only": (plain, base)}
    for sentence, (model, processor) in mixed.items():
        settings = Settings(model=ModelSettings(model_name_or_path=str(model), image_processor_name=str(processor)))
        with pytest.raises(UserError, match=sentence):
            load_base_of_run(settings, LABELS)
    with pytest.raises(UserError, match="leave --pooling out"):
        load_base(str(base), LABELS, BaseOptions(pooling="mean"))
