"""What a run hands over: read strictly, refused by the name of what differs, and replaced whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.architectures import make_checkpoint
from lora_dist_testing.edits import edit_tensors
from lora_dist_testing.tiny import make_image, make_model, make_remote_model, perturb, write_bundle
from PIL import Image
from torch import Tensor

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.deployment.export.merge import merge_to
from lora_dist.deployment.export.older_peft import export_legacy_names
from lora_dist.deployment.export.onnx_export import export
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import BaseOptions, load_base
from lora_dist.model.lora import adapters
from lora_dist.model.lora.trainable import make_trainable
from lora_dist.model.trained import bundle
from lora_dist.model.trained.bundle import read_labels, write_adapter, write_model
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.model.trained.parity import relative_difference, require_same_logits
from lora_dist.settings.train import LoraSettings, ModelSettings

LABELS = ["z, last", "a"]
IMAGES = [make_image(label, number) for label in range(2) for number in range(2)]


def _write(directory: Path, base_model: Path, labels: list[str] = LABELS, seed: int = 0) -> Tensor:
    """Writes the bundle of an adapter, and returns the logits of the model in memory."""
    model, base = write_bundle(directory, base_model, labels, seed=seed, card=f"card {seed}\n", lora_r=4)
    return _logits(model, base.processor)


@torch.inference_mode()
def _logits(model: Any, processor: Any, images: list[Image.Image] = IMAGES) -> Tensor:
    return model.eval()(pixel_values=ImageTransforms(processor).batch(images)).logits


@pytest.fixture
def base_model(tmp_path: Path) -> Path:
    """A base model that the test may move or change."""
    return make_model(tmp_path / "base")


@pytest.fixture
def adapter(base_model: Path, tmp_path: Path) -> Path:
    """A bundle that the test may damage."""
    _write(tmp_path / "adapter", base_model)
    return tmp_path / "adapter"


@pytest.fixture
def whole(adapter: Path, tmp_path: Path) -> Path:
    """The same, merged into a whole model."""
    classifier = load_classifier(adapter)
    write_model(tmp_path / "whole", adapters.merge(classifier.model), classifier.processor, "card\n")
    return tmp_path / "whole"


def _edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_bundle_holds_all_that_is_needed_and_classifies_as_the_model_in_memory(
    base_model: Path, tmp_path: Path
) -> None:
    expected = _write(tmp_path / "adapter", base_model)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_model.json",
        "config.json",
        "conversion.json",
        "preprocessor_config.json",
    }
    assert (tmp_path / "adapter" / "README.md").read_text() == "card 0\n"
    classifier = load_classifier(tmp_path / "adapter")
    assert classifier.labels == LABELS
    assert not classifier.model.training
    torch.testing.assert_close(_logits(classifier.model, classifier.processor), expected)
    require_same_logits(tmp_path / "adapter", IMAGES, expected)


def test_a_whole_model_classifies_as_the_adapter(adapter: Path, whole: Path) -> None:
    expected, actual = load_classifier(adapter), load_classifier(whole)
    assert actual.labels == expected.labels
    torch.testing.assert_close(
        _logits(actual.model, actual.processor), _logits(expected.model, expected.processor), rtol=1e-4, atol=1e-4
    )


def test_modules_that_share_weights_are_written(tmp_path: Path) -> None:
    """As in CoaT, whose blocks share their convolutions of positions."""
    base = load_base(str(make_checkpoint(tmp_path / "coat", "timm coat")), LABELS)
    assert len({id(tensor) for tensor in base.model.state_dict(keep_vars=True).values()}) < len(base.model.state_dict())
    write_model(tmp_path / "whole", base.model, base.processor, "card\n")
    loaded = load_classifier(tmp_path / "whole")
    assert torch.equal(_logits(loaded.model, loaded.processor), _logits(base.model, base.processor))


def test_labels_that_look_like_no_labels_survive(base_model: Path, tmp_path: Path) -> None:
    """`transformers` does not write LABEL_0 and LABEL_1 down, and makes them up where nothing is written."""
    labels = ["LABEL_0", "LABEL_1"]
    _write(tmp_path / "adapter", base_model, labels)
    assert load_classifier(tmp_path / "adapter").labels == labels


@pytest.mark.parametrize("kind", ["adapter", "whole"])
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (None, "no label map"),
        ({}, "not numbered from 0"),
        ({"0": "a", "2": "b"}, "not numbered from 0"),
        ({"1": "a", "2": "b"}, "not numbered from 0"),
        ({"zero": "a"}, "damaged"),
        (["a", "b"], "damaged"),
    ],
)
def test_a_missing_or_wrong_label_map_is_refused(
    labels: Any, words: str, kind: str, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(kind)
    _edit(directory / "config.json", id2label=labels)
    with pytest.raises(UserError, match=words) as caught:
        load_classifier(directory)
    assert str(directory / "config.json") in str(caught.value)


def test_a_model_of_one_class_is_refused_unless_its_output_has_a_threshold(tmp_path: Path) -> None:
    """A softmax over one output is 1 for every image."""
    whole = make_model(tmp_path / "whole", num_labels=1)
    _edit(whole / "config.json", id2label={"0": "yes"}, label2id={"yes": 0})
    with pytest.raises(UserError, match=r'a single class, yes, which every image would get.* "multi_label_classif'):
        load_classifier(whole)
    _edit(whole / "config.json", problem_type="multi_label_classification")
    classifier = load_classifier(whole)
    pixels = ImageTransforms(classifier.processor).batch([make_image(0, 0), make_image(1, 0)])
    with torch.inference_mode():
        scores = classifier.probabilities(pixels)
        torch.testing.assert_close(scores, classifier.logits(pixels).sigmoid())


def test_labels_are_read_by_number_and_not_by_place_in_the_file(adapter: Path) -> None:
    names = {str(number): f"class {number}" for number in (10, 2, 0, 1, *range(3, 10))}
    _edit(adapter / "config.json", id2label=names, label2id=None)
    assert read_labels(adapter) == [f"class {number}" for number in range(11)]


def test_a_label_map_of_another_number_of_classes_is_refused(adapter: Path) -> None:
    _edit(adapter / "config.json", id2label={"0": "a", "1": "b", "2": "c"}, label2id=None)
    with pytest.raises(UserError, match=r"classifier\.weight is \[2, 32\] and should be \[3, 32\]"):
        load_classifier(adapter)


def test_another_base_is_refused_and_both_are_named(adapter: Path, base_model: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="is not the base") as caught:
        load_classifier(adapter, str(other))
    identity = json.loads((adapter / "base_model.json").read_text())
    for part in (other, adapter, base_model, identity["fingerprint"], "Name the base that has these weights: --base"):
        assert str(part) in str(caught.value)


def test_a_base_that_changed_in_place_is_refused(adapter: Path, base_model: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        next(tensor for name, tensor in state.items() if name.endswith("query.weight"))[0, 0] += 1e-4

    edit_tensors(base_model / "model.safetensors", change)
    with pytest.raises(UserError, match="is not the base"):
        load_classifier(adapter)


def test_a_base_that_moved_is_missed_by_name_and_found_where_it_is(
    adapter: Path, base_model: Path, tmp_path: Path
) -> None:
    expected = load_classifier(adapter)
    shutil.move(base_model, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"(?s){base_model}.*--base_model"):
        load_classifier(adapter)
    moved = load_classifier(adapter, str(tmp_path / "elsewhere"))
    assert torch.equal(_logits(moved.model, moved.processor), _logits(expected.model, expected.processor))


@pytest.mark.parametrize(
    "name",
    ["config.json", "preprocessor_config.json", "adapter_config.json", "adapter_model.safetensors"],
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_missing_or_damaged_file_is_refused_by_name(name: str, damage: str, adapter: Path) -> None:
    file = adapter / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(UserError) as caught:
        load_classifier(adapter)
    assert str(adapter) in str(caught.value)
    if (damage == "missing" and name != "adapter_config.json") or (name.endswith(".json") and "adapter" not in name):
        assert name in str(caught.value)


@pytest.mark.parametrize("key", ["model_name_or_path", "fingerprint", "revision"])
def test_a_base_model_file_that_lacks_an_entry_is_refused(key: str, adapter: Path) -> None:
    content = json.loads((adapter / "base_model.json").read_text())
    del content[key]
    (adapter / "base_model.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"it has no '{key}'"):
        load_classifier(adapter)


def test_a_base_model_file_of_another_kind_is_refused(adapter: Path) -> None:
    (adapter / "base_model.json").write_text("[]")
    with pytest.raises(UserError, match=r"base_model\.json is damaged"):
        load_classifier(adapter)


def test_a_whole_model_without_its_head_is_refused(whole: Path) -> None:
    """`transformers` would give it a random one and classify."""
    edit_tensors(whole / "model.safetensors", lambda state: state.pop("classifier.weight"))
    with pytest.raises(UserError, match=r"lack classifier\.weight"):
        load_classifier(whole)


def test_a_name_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        load_classifier(tmp_path / "nothing")


@pytest.mark.parametrize("where", ["lora_B", "classifier.bias"])
def test_a_bundle_that_classifies_otherwise_than_the_model_in_memory_is_noticed(
    where: str, base_model: Path, tmp_path: Path
) -> None:
    expected = _write(tmp_path / "adapter", base_model)
    edit_tensors(
        tmp_path / "adapter" / "adapter_model.safetensors",
        lambda state: [tensor.zero_() for name, tensor in state.items() if where in name],
    )
    with pytest.raises(RuntimeError, match="gives other logits after loading"):
        require_same_logits(tmp_path / "adapter", IMAGES, expected)


def test_logits_that_are_not_finite_are_not_the_same(base_model: Path, tmp_path: Path) -> None:
    expected = _write(tmp_path / "adapter", base_model)
    expected = expected.clone()
    expected[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="gives other logits"):
        require_same_logits(tmp_path / "adapter", IMAGES, expected)


def test_a_processor_that_was_exchanged_is_noticed(base_model: Path, tmp_path: Path) -> None:
    expected = _write(tmp_path / "adapter", base_model)
    _edit(tmp_path / "adapter" / "preprocessor_config.json", image_mean=[0.9, 0.1, 0.3])
    with pytest.raises(RuntimeError, match="gives other logits"):
        require_same_logits(tmp_path / "adapter", IMAGES, expected)


def test_a_bundle_is_replaced_whole(adapter: Path, base_model: Path) -> None:
    (adapter / "stale").write_text("of the old one")
    expected = _write(adapter, base_model, seed=1)
    assert not (adapter / "stale").exists()
    assert (adapter / "README.md").read_text() == "card 1\n"
    require_same_logits(adapter, IMAGES, expected)
    assert {path.name for path in adapter.parent.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize("function", ["save_adapter", "_write_json"])
def test_a_bundle_stands_as_it_was_when_writing_the_next_one_fails(
    function: str, adapter: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up halfway, say."""
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(adapters if function == "save_adapter" else bundle, function, fail)
    with pytest.raises(OSError, match="no space left"):
        _write(adapter, base_model, seed=1)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_code_that_comes_with_a_base_runs_where_it_is_trusted_and_nowhere_else(tmp_path: Path) -> None:
    """In the adapter, its export, its merge; the message names the flag, and not what Python would call it."""
    remote = make_remote_model(tmp_path / "remote")
    with pytest.raises(UserError, match=rf"{remote}' contains its own code.* --trust_remote_code runs it"):
        load_base(str(remote), LABELS)
    base = load_base(str(remote), LABELS, BaseOptions(trust_remote_code=True))
    model = make_trainable(base, ModelSettings(), LoraSettings(lora_r=4))
    perturb(model)
    adapter = tmp_path / "adapter"
    write_adapter(adapter, model, base, "card\n")
    with pytest.raises(UserError, match="--trust_remote_code runs it"):
        load_classifier(adapter)
    assert read_labels(adapter) == LABELS
    expected = _logits(model, base.processor)
    export_legacy_names(load_classifier(adapter, trust_remote_code=True), "card\n", tmp_path / "old", [], True)
    merge_to(load_classifier(adapter, trust_remote_code=True), "x", tmp_path / "merged", [], 1e-4, "fp32", True)
    for directory in (adapter, tmp_path / "old", tmp_path / "merged"):
        found = load_classifier(directory, trust_remote_code=True)
        assert type(adapters.base_of(found.model)).__name__ == "RemoteModel"
        torch.testing.assert_close(_logits(found.model, found.processor), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="RemoteProcessor has code of its own, which an ONNX file does not contain"):
        export(load_classifier(adapter, trust_remote_code=True), tmp_path / "model.onnx", [])


def test_code_that_comes_with_the_base_of_a_foreign_adapter_is_not_run(tmp_path: Path) -> None:
    base = load_base(str(make_remote_model(tmp_path / "remote")), LABELS, BaseOptions(trust_remote_code=True))
    adapters.save_adapter(make_trainable(base, ModelSettings(), LoraSettings()), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"remote' contains its own code.* --trust_remote_code runs it"):
        load_classifier(tmp_path / "adapter")
    assert load_classifier(tmp_path / "adapter", None, True).labels == ["LABEL_0", "LABEL_1"]


def test_a_fine_tuned_checkpoint_is_a_base_for_other_classes(tmp_path: Path) -> None:
    """Of another number, or of as many with other names."""
    fine_tuned = make_model(tmp_path / "base", num_labels=5)
    for labels in (["x", "y"], [f"other {number}" for number in range(5)]):
        directory = tmp_path / str(len(labels))
        model, base = write_bundle(directory, fine_tuned, labels, lora_r=2)
        loaded = load_classifier(directory)
        assert loaded.labels == labels
        torch.testing.assert_close(_logits(loaded.model, loaded.processor), _logits(model, base.processor))


def test_files_of_a_bundle_can_be_read_by_others(adapter: Path) -> None:
    """safetensors writes with mode 600, which locks out whoever serves the model."""
    modes = {path.name: path.stat().st_mode & 0o777 for path in adapter.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_the_relative_difference_is_of_the_largest_logit() -> None:
    assert relative_difference(torch.tensor([1.0, -3.9]), torch.tensor([1.0, -4.0])) == pytest.approx(0.025)
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0
