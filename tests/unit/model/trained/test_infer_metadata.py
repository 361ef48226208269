"""Adapters that say little of themselves: where the base, the classes and their names come from then."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from lora_dist_testing.backbones import make_backbone
from lora_dist_testing.edits import edit_json
from lora_dist_testing.old_adapters import OLD, expected_of, logits
from lora_dist_testing.tiny import perturb, write_bundle

from lora_dist.errors import UserError
from lora_dist.model.base.backbone import load_base
from lora_dist.model.lora import adapter_io, adapters
from lora_dist.model.lora.trainable import make_trainable
from lora_dist.model.trained.bundle import write_adapter
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.model.trained.infer_metadata import read_class_names
from lora_dist.settings.train import LoraSettings, ModelSettings


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    """The guide's adapter as it lies on the Hub, beside its base."""
    shutil.copytree(OLD / "base", tmp_path / "base")
    adapter = Path(shutil.copytree(OLD / "peft_0_2", tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    return adapter


def test_base_classes_and_processor_are_found(guide: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        classifier = load_classifier(guide)
    assert classifier.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert classifier.processor.size == {"height": 16, "width": 16}
    assert classifier.base is not None
    assert classifier.base["model_name_or_path"] == str(guide.parent / "base")
    torch.testing.assert_close(logits(classifier.model), expected_of(guide), rtol=1e-5, atol=1e-5)
    assert "cannot check that" in caplog.text
    assert "classes are named LABEL_0" in caplog.text
    assert "--class_names" in caplog.text


def test_a_processor_beside_the_adapter_is_taken(guide: Path) -> None:
    content = json.loads((guide.parent / "base" / "preprocessor_config.json").read_text())
    (guide / "preprocessor_config.json").write_text(json.dumps(content | {"image_mean": [0.1, 0.2, 0.3]}))
    assert list(load_classifier(guide).processor.image_mean) == [0.1, 0.2, 0.3]


def test_labels_can_be_given(guide: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_classifier(guide, labels=["rose", "tulip", "daisy"]).labels == ["rose", "tulip", "daisy"]
    assert "LABEL" not in caplog.text
    with pytest.raises(UserError, match=r"names 2 classes, and the adapter in .* has 3"):
        load_classifier(guide, labels=["rose", "tulip"])


def test_a_base_elsewhere_or_nowhere(guide: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    (tmp_path / "base").rename(moved)
    with pytest.raises(UserError, match=rf"(?s){tmp_path / 'base'}.*--base_model"):
        load_classifier(guide)
    expected = expected_of(guide)
    torch.testing.assert_close(logits(load_classifier(guide, str(moved)).model), expected, rtol=1e-5, atol=1e-5)
    edit_json(guide / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(UserError, match="does not name the base; name it with --base_model"):
        load_classifier(guide)
    torch.testing.assert_close(logits(load_classifier(guide, str(moved)).model), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_without_a_head_has_that_of_its_base(guide: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = torch.load(guide / "adapter_model.bin", weights_only=True)
    torch.save({name: tensor for name, tensor in state.items() if "lora_" in name}, guide / "adapter_model.bin")
    edit_json(guide / "adapter_config.json", modules_to_save=None)
    edit_json(guide.parent / "base" / "config.json", id2label={"0": "no", "1": "yes"})
    with caplog.at_level(logging.WARNING):
        classifier = load_classifier(guide)
    assert classifier.labels == ["no", "yes"]
    assert "no label map" not in caplog.text
    assert logits(classifier.model).shape == (2, 2)
    edit_json(guide.parent / "base" / "config.json", id2label={"1": "no", "2": "yes"})
    with pytest.raises(UserError, match=r"is not numbered from 0: name the classes with --class_names"):
        load_classifier(guide)
    assert load_classifier(guide, labels=["no", "yes"]).labels == ["no", "yes"]


def test_weights_that_nobody_brings_are_not_left_random(guide: Path) -> None:
    state = torch.load(guide.parent / "base" / "pytorch_model.bin", weights_only=True)
    del state["vit.layernorm.weight"]
    torch.save(state, guide.parent / "base" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"neither .* nor the adapter in .* has weights for vit\.layernorm\.weight"):
        load_classifier(guide)


def test_the_number_of_classes_is_found_on_every_architecture(architecture: Path, tmp_path: Path) -> None:
    """In the head alone, whatever it looks like; a bundle of ours without all that is beside the adapter."""
    labels = [str(number) for number in range(7)]
    base = load_base(str(architecture), labels)
    model = make_trainable(base, ModelSettings(), LoraSettings(lora_r=2))
    perturb(model)
    adapters.save_adapter(model, tmp_path)
    (tmp_path / "README.md").unlink(missing_ok=True)
    assert load_classifier(tmp_path, labels=labels).labels == labels
    assert load_classifier(tmp_path).labels == [f"LABEL_{label}" for label in labels]


@pytest.fixture
def own(vit: Path, tmp_path: Path) -> Path:
    """A bundle of this project."""
    base = load_base(str(vit), ["cat", "dog"])
    model = make_trainable(base, ModelSettings(), LoraSettings(lora_r=2))
    write_adapter(tmp_path / "own", model, base, "card\n")
    return tmp_path / "own"


def test_a_label_map_is_not_overruled(own: Path) -> None:
    assert load_classifier(own, labels=["cat", "dog"]).labels == ["cat", "dog"]
    with pytest.raises(UserError, match="--class_names differs from the label map"):
        load_classifier(own, labels=["dog", "cat"])


def test_a_bundle_that_lost_a_file_can_be_helped_in_words(own: Path, vit: Path) -> None:
    (own / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json has no label map.* name a file with --class_names"):
        load_classifier(own)
    assert load_classifier(own, labels=["a", "b"]).labels == ["a", "b"]
    (own / "base_model.json").unlink()
    edit_json(own / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(UserError, match="name it with --base_model"):
        load_classifier(own)
    assert load_classifier(own, str(vit), labels=["a", "b"]).labels == ["a", "b"]
    with pytest.raises(UserError, match="names 3 classes"):
        load_classifier(own, str(vit), labels=["a", "b", "c"])


@pytest.mark.parametrize("labelled", [True, False])
def test_a_configuration_beside_an_adapter_from_elsewhere_makes_it_no_bundle(
    labelled: bool, own: Path, vit: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody pushed both. PEFT's file says what the base is, and the warning that it cannot be checked."""
    (own / "base_model.json").unlink()
    content = json.loads((own / "config.json").read_text())
    if not labelled:
        del content["id2label"], content["label2id"]
    (own / "config.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        classifier = load_classifier(own)
    assert classifier.labels == (["cat", "dog"] if labelled else ["LABEL_0", "LABEL_1"])
    assert f"has no base_model.json: cannot check that {vit} is its base" in caplog.text


@pytest.mark.parametrize("name", ["adapter", "model"])
def test_the_directory_of_a_run_is_not_its_result(name: str, own: Path, vit: Path, tmp_path: Path) -> None:
    shutil.copytree(own if name == "adapter" else vit, tmp_path / "run" / name)
    with pytest.raises(UserError, match=rf"run is not an adapter.* {tmp_path / 'run' / name}$"):
        adapter_io.read(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(UserError, match=rf"a run's checkpoints; pass its result, {tmp_path / 'run' / name}$"):
        adapter_io.read(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=rf"run is not a model.* {tmp_path / 'run' / name}$"):
        load_classifier(tmp_path / "run")


def test_a_whole_model_is_not_taken_for_an_adapter(vit: Path) -> None:
    with pytest.raises(UserError, match=r"vit is not an adapter.*a whole model.*--model, .*--model_name_or_path"):
        adapter_io.read(vit)


def test_labels_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("rose\n tulip, red \n\némoji 🦊\n", encoding="utf-8")
    assert read_class_names(str(path)) == ["rose", "tulip, red", "émoji 🦊"]
    path.write_text("rose\ntulip\n", encoding="utf-8-sig")  # as editors on Windows write it
    assert read_class_names(str(path)) == ["rose", "tulip"]
    path.write_text("a\nb\na\n")
    with pytest.raises(UserError, match="duplicates: a"):
        read_class_names(str(path))
    path.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_class_names(str(path))
    with pytest.raises(UserError, match="nowhere"):
        read_class_names(str(tmp_path / "nowhere"))


def test_an_adapter_without_labels_on_a_base_without_a_classifier_is_an_error_of_the_user(tmp_path: Path) -> None:
    base = make_backbone(tmp_path / "base", "clip_vision")
    write_bundle(tmp_path / "adapter", base, ["x", "y", "z"])
    for file in ("config.json", "base_model.json"):
        (tmp_path / "adapter" / file).unlink()
    with pytest.raises(UserError, match="as an image classifier"):
        load_classifier(tmp_path / "adapter")
