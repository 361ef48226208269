"""Adapters in the names and files of old releases: what is in them, and that they come back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.backbones import make_backbone
from lora_dist_testing.disks import small_disk
from lora_dist_testing.edits import edit_json
from lora_dist_testing.launching import flags
from lora_dist_testing.old_adapters import OLD, expected_of, logits
from lora_dist_testing.tiny import make_image, write_bundle
from safetensors.torch import load_file

from lora_dist.deployment.export.older_peft import card_of, export_legacy_names
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import load_base
from lora_dist.model.lora.trainable import make_trainable
from lora_dist.model.trained.adapter_set import load_adapter_set
from lora_dist.model.trained.bundle import write_adapter
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.predict import predict
from lora_dist.settings.train import LoraSettings, ModelSettings

KINDS: list[dict[str, Any]] = [
    {"lora_r": 4},
    {"lora_target_modules": ["fc2"]},
    {"lora_target_modules": ["query", "output.dense"], "lora_bias": "all", "use_rslora": True},
    {"use_dora": True},
    {"lora_rank_pattern": {"query": 2}, "lora_alpha_pattern": {"layers.1.attention.v_proj": 3}, "train_norms": True},
    {"layers_to_transform": "last:1", "lora_alpha_pattern": {"q_proj": 5}, "use_rslora": True},
]


@pytest.mark.parametrize("lora", KINDS, ids=str)
def test_an_export_comes_back_with_its_logits_labels_and_base(lora: dict[str, Any], vit: Path, tmp_path: Path) -> None:
    model, base = write_bundle(tmp_path / "adapter", vit, ["x", "y", "z"], card="a card\n", **lora)
    export_legacy_names(load_classifier(tmp_path / "adapter"), "a card\n", tmp_path / "old", [])
    found = load_classifier(tmp_path / "old")
    assert found.labels == ["x", "y", "z"]
    assert found.base == base.identity()
    assert (tmp_path / "old" / "README.md").read_text() == "a card\n"
    torch.testing.assert_close(logits(found.model, 32), logits(model, 32))
    state = load_file(tmp_path / "old" / "adapter_model.safetensors")
    pickled = torch.load(tmp_path / "old" / "adapter_model.bin", weights_only=True)
    assert state.keys() == pickled.keys()
    assert all(torch.equal(state[name], pickled[name]) for name in state)


def test_the_pictures_of_the_card_come_along(vit: Path, tmp_path: Path) -> None:
    adapter, card = tmp_path / "adapter", "![Reliability diagram](reliability.png)\n![gone](gone.png)\n"
    write_bundle(adapter, vit, ["x", "y", "z"], card=card)
    make_image(0, 0).save(adapter / "reliability.png")
    make_image(0, 0).save(adapter / "other.png")
    predict(flags(adapter=adapter, export_legacy_names=tmp_path / "old"))
    assert (tmp_path / "old" / "README.md").read_text() == card
    assert [file.name for file in (tmp_path / "old").glob("*.png")] == ["reliability.png"]


def test_the_names_are_those_of_the_guide(vit: Path, tmp_path: Path) -> None:
    """An adapter that the guide's releases made comes back from here with the same keys, tensors and settings."""
    source = OLD / "peft_0_2"
    export_legacy_names(load_classifier(source, str(OLD / "base")), "card\n", tmp_path / "old", [])
    theirs = torch.load(source / "adapter_model.bin", weights_only=True)
    ours = torch.load(tmp_path / "old" / "adapter_model.bin", weights_only=True)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    original = json.loads((source / "adapter_config.json").read_text())
    assert config.keys() <= original.keys()
    # The base is where it is now.
    original["base_model_name_or_path"] = str(OLD / "base")
    assert config == {name: original[name] for name in config}
    torch.testing.assert_close(
        logits(load_classifier(tmp_path / "old").model), expected_of(source), rtol=1e-5, atol=1e-5
    )


def test_targets_whose_last_part_is_shared_are_named_in_full(vit: Path, tmp_path: Path) -> None:
    """`dense` ends three old names of a ViT layer, of which one is meant."""
    base = load_base(str(vit), ["x", "y"])
    model = make_trainable(base, ModelSettings(), LoraSettings(lora_target_modules=["fc2"]))
    write_adapter(tmp_path / "adapter", model, base, "a card\n")
    export_legacy_names(load_classifier(tmp_path / "adapter"), "a card\n", tmp_path / "old", [])
    config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"vit.encoder.layer.{layer}.output.dense" for layer in (0, 1)]


def test_one_of_several_is_exported_with_its_own_labels(vit: Path, tmp_path: Path) -> None:
    """The base that they share has the labels of the first."""
    labels = {"one": ["x", "y"], "two": ["p", "q", "r"]}
    for name in labels:
        write_bundle(tmp_path / name, vit, labels[name], seed=len(labels[name]))
    adapter_set = load_adapter_set({name: tmp_path / name for name in labels})
    export_legacy_names(adapter_set.set_adapter("two"), "card\n", tmp_path / "old", [])
    found = load_classifier(tmp_path / "old")
    assert found.labels == labels["two"]
    torch.testing.assert_close(logits(found.model, 32), logits(load_classifier(tmp_path / "two").model, 32))


def test_the_revision_of_a_base_that_was_replaced_is_not_that_of_the_new_one(tmp_path: Path) -> None:
    source = Path(shutil.copytree(OLD / "peft_0_14", tmp_path / "adapter"))
    edit_json(source / "adapter_config.json", revision="v1")
    export_legacy_names(load_classifier(source, str(OLD / "base")), "card\n", tmp_path / "old", [])
    config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    assert "revision" not in config


def test_the_card_is_that_of_the_adapter_but_not_of_one_in_a_blend(tmp_path: Path) -> None:
    """The numbers on it are not the blend's."""
    with_card, without = tmp_path / "a", tmp_path / "snapshots" / "0123abc"
    for directory in (with_card, without):
        directory.mkdir(parents=True)
    (with_card / "README.md").write_bytes(b"# accuracy: 99% \xff\n")
    assert card_of([with_card], "a").startswith("# accuracy: 99%")
    assert card_of([without], "org/name").startswith("# org/name\n")
    blend = card_of([with_card, without], "0.5 x a + 0.5 x b")
    assert blend.startswith("# 0.5 x a + 0.5 x b\n")
    assert "99%" not in blend


@pytest.mark.root
def test_a_disk_that_fills_up_while_the_pickle_is_written_is_an_error_of_the_disk(tmp_path: Path) -> None:
    """torch itself makes a RuntimeError of it."""
    classifier = load_classifier(OLD / "peft_0_2", str(OLD / "base"))
    export_legacy_names(classifier, "card\n", tmp_path / "old", [])
    pages = -(-(tmp_path / "old" / "adapter_model.safetensors").stat().st_size // 4096)
    with small_disk(tmp_path / "disk", f"{4 * pages}k") as disk, pytest.raises(OSError, match="No space left"):
        export_legacy_names(classifier, "card\n", disk / "old", [])


def test_a_directory_in_use_is_left_alone(vit: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    classifier = load_classifier(OLD / "peft_0_2", str(OLD / "base"))
    with pytest.raises(UserError, match=r"--export_legacy_names .* is not empty"):
        export_legacy_names(classifier, "card\n", tmp_path, [])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_layers_that_transformers_4_joins_with_others_are_refused(tmp_path: Path) -> None:
    """The checkpoints of RADIO have queries, keys and values in one matrix."""
    write_bundle(tmp_path / "adapter", make_backbone(tmp_path / "radio", "radio"), ["x", "y"])
    classifier = load_classifier(tmp_path / "adapter")
    with pytest.raises(
        UserError, match=r"--export_legacy_names: backbone\S+q_proj, .* have no names in transformers 4"
    ):
        export_legacy_names(classifier, "card\n", tmp_path / "old", [])
    assert not (tmp_path / "old").exists()
