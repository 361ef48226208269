"""What the head of a model is, and that training changes it, the LoRA layers, and nothing else."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.edits import edit_json
from lora_dist_testing.tiny import CLASSES, WITHOUT_PREFIX, make_config, make_image, make_model, perturb
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, CLIPModel, pipeline

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import Base, BaseOptions, load_base, load_base_of_run
from lora_dist.model.base.head import EMPTY_FINGERPRINT, class_dimensions, find_heads, fingerprint
from lora_dist.model.lora import adapters, injection
from lora_dist.model.lora.targets import shortest
from lora_dist.model.lora.trainable import make_trainable, set_training
from lora_dist.model.trained.bundle import write_adapter, write_model
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.settings.train import LoraSettings, ModelSettings, RunSettings, Settings

LABELS = list(CLASSES)
HEADS = {"hgnet_v2": ["fc"], "poolformer": ["norm", "classifier"], "swiftformer": ["norm", "head", "dist_head"]}


def _pixels(base: Base) -> Tensor:
    return ImageTransforms(base.processor).batch([make_image(label, number) for label in range(3) for number in (0, 1)])


def _logits(model: nn.Module, base: Base) -> Tensor:
    with torch.inference_mode():
        return model.eval()(pixel_values=_pixels(base)).logits


def _make(name: str, directory: Path, **more: Any) -> Path:
    return make_model(directory / name, name, image_size=64 if name in ("poolformer", "swiftformer") else 32, **more)


def test_heads_and_fingerprints_of_models_with_a_prefix_are_those_of_earlier_versions(architecture: Path) -> None:
    """Adapters in the field record them."""
    base = load_base(str(architecture), LABELS)
    prefix = base.model.base_model_prefix
    children = {name: child for name, child in base.model.named_children() if name != prefix}
    assert base.heads == [name for name, child in children.items() if list(child.parameters())]
    digests = sorted(
        hashlib.sha256(str(list(tensor.shape)).encode() + tensor.numpy().tobytes()).digest()
        for name, tensor in base.model.state_dict().items()
        if tensor.dtype == torch.float32 and not name.startswith(tuple(f"{head}." for head in base.heads))
    )
    assert base.fingerprint == hashlib.sha256(b"".join(digests)).hexdigest()[:32]


@pytest.mark.parametrize("tuning", ["lora", "head"])
@pytest.mark.parametrize("name", [*WITHOUT_PREFIX, "poolformer", "swiftformer"])
def test_the_head_trains_and_with_lora_its_matrices_and_nothing_else(name: str, tuning: Any, tmp_path: Path) -> None:
    directory = _make(name, tmp_path)
    base = load_base(str(directory), LABELS)
    assert base.heads == HEADS.get(name, ["classifier"])
    other = load_base(str(directory), ["x", "y"], BaseOptions(seed=5))
    assert base.fingerprint == other.fingerprint != EMPTY_FINGERPRINT
    assert base.fingerprint != load_base(str(_make(name, tmp_path / "other", seed=1)), LABELS).fingerprint
    model = make_trainable(base, ModelSettings(tuning=tuning), LoraSettings(lora_r=4))
    trained = [key.removeprefix("base_model.model.") for key, value in model.named_parameters() if value.requires_grad]
    heads = [key for key in trained if ".lora_" not in key]
    assert all(key.startswith(tuple(f"{head}.modules_to_save." for head in base.heads)) for key in heads)
    assert {key.partition(".modules_to_save")[0] for key in heads} == set(base.heads)
    assert (len(trained) > len(heads)) == (tuning == "lora")
    set_training(model)
    model(pixel_values=_pixels(base)).logits.sum().backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
    perturb(model)
    expected = _logits(model, base)
    write_adapter(tmp_path / "adapter", model, base, "card\n")
    loaded = load_classifier(tmp_path / "adapter")
    torch.testing.assert_close(_logits(loaded.model, base), expected)
    plain = AutoModelForImageClassification.from_pretrained(
        directory, num_labels=3, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    torch.testing.assert_close(_logits(PeftModel.from_pretrained(plain, tmp_path / "adapter"), base), expected)
    merged: Any = adapters.merge(loaded.model)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(_logits(again, base), expected, rtol=1e-4, atol=1e-4)
    assert (_logits(load_base(str(directory), LABELS).model, base) - expected).abs().max() > 1e-2


def test_a_tower_of_a_checkpoint_with_two_is_a_base(tmp_path: Path) -> None:
    CLIPModel(make_config("clip")).save_pretrained(tmp_path)
    load_base(str(make_model(tmp_path / "vit")), LABELS).processor.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), LABELS)
    assert base.heads == ["classifier"]
    assert base.missing == ["classifier.bias", "classifier.weight"]


def test_an_adapter_whose_head_was_the_whole_model_still_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Earlier versions trained both and recorded the fingerprint of nothing."""
    directory = _make("clip", tmp_path)
    base = load_base(str(directory), LABELS)
    model = injection.inject_head_only(base.model, ["vision_model", "classifier"])
    perturb(model)
    expected = _logits(model, base)
    write_adapter(tmp_path / "adapter", model, base, "card\n")
    path = tmp_path / "adapter" / "base_model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": EMPTY_FINGERPRINT}))
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(_logits(load_classifier(tmp_path / "adapter").model, base), expected)
    assert "cannot check its base" in caplog.text


def test_a_model_without_logits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="PPLCNetForImageClassification returns no logits"):
        load_base(str(_make("pp_lcnet", tmp_path)), LABELS)


def test_a_head_is_never_most_of_the_weights_and_a_fingerprint_never_empty(vit: Path, tmp_path: Path) -> None:
    config = make_config("resnet")
    config.num_labels = 5000
    many = AutoModelForImageClassification.from_config(config)
    assert find_heads(many) == ["classifier"]
    with pytest.raises(UserError, match="no weights in fp32 outside its head"):
        fingerprint(many, ["resnet", "classifier"])
    backbone = load_base(str(vit), LABELS)
    backbone.model.base_model_prefix = "classifier"
    with pytest.raises(UserError, match="vit hold most of its weights"):
        find_heads(backbone.model)
    path = make_model(tmp_path / "vit")
    state = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if "encoder" not in name}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no weights for most of ViTForImageClassification: \d+ parameters"):
        load_base(str(path), LABELS)


def test_lora_without_effect_is_refused(vit: Path) -> None:
    """A model may read the weights of a layer without calling it, as timm's EVA02 does."""
    base = load_base(str(vit), LABELS)
    for layer in base.model.vit.layers:
        project = layer.attention.q_proj
        layer.attention.q_proj = _Reader(project)
    with pytest.raises(UserError, match=r"LoRA on vit\.layers\.0\.attention\.q_proj\.read, .* has no effect"):
        make_trainable(base, ModelSettings(), LoraSettings(lora_target_modules=["read"]))


class _Reader(nn.Module):
    """A linear layer that is read and never called."""

    def __init__(self, read: nn.Linear) -> None:
        super().__init__()
        self.read = read

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.read.weight, self.read.bias)


def test_targets_that_peft_cannot_select_alone_are_refused(vit: Path) -> None:
    base = load_base(str(vit), LABELS)
    base.model.register_module("query", nn.Linear(2, 2))
    base.model.vit.register_module("query", nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"PEFT cannot adapt query without vit\.query"):
        shortest(["query"], base.model)


def _classifier(directory: Path, name: str, labels: list[str]) -> tuple[Path, Tensor]:
    """A base that classifies `labels`, several of them at once, and its logits."""
    base = load_base(str(_make(name, directory)), labels)
    perturb(base.model)
    base.model.config.problem_type = "multi_label_classification"
    base.model.save_pretrained(directory / "classifier")
    base.processor.save_pretrained(directory / "classifier")
    return directory / "classifier", _logits(base.model, base)


def _settings(directory: Path, seed: int = 0) -> Settings:
    return Settings(model=ModelSettings(model_name_or_path=str(directory)), run=RunSettings(seed=seed))


@pytest.mark.parametrize("name", ["vit", "resnet", "hgnet_v2", "swiftformer"])
def test_the_head_of_a_base_with_the_same_classes_in_another_order_is_permuted(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, expected = _classifier(tmp_path, name, ["x", "y", "z"])
    with caplog.at_level(logging.INFO):
        base = load_base_of_run(_settings(directory), ["z", "x", "y"])
    torch.testing.assert_close(_logits(base.model, base), expected[:, [2, 0, 1]])
    assert "same classes in another order" in caplog.text
    assert base.missing == []
    caplog.clear()
    base = load_base_of_run(_settings(directory), ["x", "y", "z"])
    torch.testing.assert_close(_logits(base.model, base), expected)
    assert "head" not in caplog.text


@pytest.mark.parametrize("name", ["vit", "resnet", "hgnet_v2", "swiftformer"])
def test_the_head_of_a_base_with_other_classes_is_made_anew(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, expected = _classifier(tmp_path, name, ["x", "y", "z"])
    base, again, other = (load_base_of_run(_settings(directory, seed), ["p", "q", "r"]) for seed in (3, 3, 4))
    assert "the base has other classes (x, y, z, …) than the data" in caplog.text
    assert torch.equal(_logits(base.model, base), _logits(again.model, base))
    assert not torch.allclose(_logits(base.model, base), _logits(other.model, base))
    kept = load_base(str(directory), ["p", "q", "r"])
    assert torch.equal(_logits(kept.model, base), expected), "an adapter without a head needs it"
    assert base.fingerprint == kept.fingerprint
    assert base.heads == kept.heads
    before, after = kept.model.state_dict(), base.model.state_dict()
    assert {key for key in after if not torch.equal(before[key], after[key])} == set(
        class_dimensions(base.model.config, type(base.model))
    )
    assert base.missing == []
    fresh = load_base_of_run(_settings(directory), ["p", "q", "r", "s"]).model.state_dict()
    for key in (key for key in fresh if before[key].shape != fresh[key].shape and key.endswith("weight")):
        assert 0.3 < after[key].std() / fresh[key].std() < 3, "as for another number of classes"


def test_the_head_of_a_base_that_does_not_name_its_classes_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, expected = _classifier(tmp_path, "vit", ["LABEL_0", "LABEL_1", "LABEL_2"])
    with caplog.at_level(logging.INFO):
        base = load_base_of_run(_settings(directory), ["z", "x", "y"])
    torch.testing.assert_close(_logits(base.model, base), expected)
    assert "keeping the head of the base" in caplog.text


@pytest.mark.parametrize("names", [None, {}])
def test_the_head_of_a_base_without_a_label_map_stays(
    names: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, expected = _classifier(tmp_path, "vit", ["x", "y", "z"])
    edit_json(directory / "config.json", id2label=names)
    with caplog.at_level(logging.INFO):
        base = load_base_of_run(_settings(directory), ["z", "x", "y"])
    torch.testing.assert_close(_logits(base.model, base), expected)
    assert "keeping the head of the base, which does not name its 3 classes" in caplog.text


@pytest.mark.parametrize("names", [{"1": "x", "2": "y", "3": "z"}, {"0": "x", "1": "y", "5": "z"}])
def test_the_head_of_a_base_whose_classes_are_not_numbered_from_0_is_made_anew(
    names: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody knows which of its outputs is which class."""
    directory, expected = _classifier(tmp_path, "vit", ["x", "y", "z"])
    edit_json(directory / "config.json", id2label=names, label2id=None)
    for labels in (["x", "y", "z"], ["z", "x", "y"]):
        base = load_base_of_run(_settings(directory), labels)
        assert not torch.allclose(_logits(base.model, base).sort().values, expected.sort().values)
    assert caplog.text.count("the base has classes that are not numbered from 0 (") == 2


@pytest.mark.parametrize("names", [["x", "y", "z"], {"x": 0, "y": 1, "z": 2}, "x, y, z"])
def test_a_base_whose_label_map_is_none_is_refused(names: Any, tmp_path: Path) -> None:
    directory, _ = _classifier(tmp_path, "vit", ["x", "y", "z"])
    edit_json(directory / "config.json", id2label=names)
    with pytest.raises(UserError, match=r"id2label\) in its config\.json does not map numbers to names: write it as "):
        load_base_of_run(_settings(directory), ["x", "y", "z"])


def test_class_names_that_are_numbers_are_those_of_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory, expected = _classifier(tmp_path, "vit", ["7", "8", "9"])
    edit_json(directory / "config.json", id2label={"0": 7, "1": 8, "2": 9})
    base = load_base_of_run(_settings(directory), ["8", "9", "7"])
    torch.testing.assert_close(_logits(base.model, base), expected[:, [1, 2, 0]])
    load_base_of_run(_settings(directory), ["x", "y", "z"])
    assert "the base has other classes (7, 8, 9, …) than the data" in caplog.text


def test_the_problem_type_of_the_base_does_not_stay(tmp_path: Path) -> None:
    directory, _ = _classifier(tmp_path, "vit", ["x", "y", "z"])
    assert json.loads((directory / "config.json").read_text())["problem_type"] == "multi_label_classification"
    base = load_base_of_run(_settings(directory), ["x", "y", "z"])
    write_adapter(tmp_path / "adapter", make_trainable(base, ModelSettings(), LoraSettings()), base, "card\n")
    merged: Any = adapters.merge(load_classifier(tmp_path / "adapter").model)
    write_model(tmp_path / "merged", merged, base.processor, "card\n")
    full = load_base_of_run(_settings(directory), ["x", "y", "z"])
    write_model(tmp_path / "full", full.model, full.processor, "card\n")
    for name in ("adapter", "merged", "full"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["problem_type"] == "single_label_classification", name
    found = pipeline("image-classification", str(tmp_path / "merged"))(make_image(0, 0))
    assert sum(label["score"] for label in found) == pytest.approx(1)
