"""Several adapters on one base: chosen without loading it again, and blended exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.edits import edit_json, edit_tensors
from lora_dist_testing.old_adapters import OLD, expected_of, logits
from lora_dist_testing.tiny import make_model, write_bundle
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_dist.errors import UserError
from lora_dist.model.base.backbone import load_base
from lora_dist.model.lora import adapters
from lora_dist.model.trained.adapter_set import load_adapter_set, load_weighted_sum
from lora_dist.model.trained.classifier import load_classifier

LABELS = ["x", "y", "z"]


def _write(directory: Path, base_model: Path, seed: int, labels: list[str] = LABELS, **lora: Any) -> Tensor:
    """Writes a bundle, and returns its logits."""
    model, _ = write_bundle(directory, base_model, labels, seed=seed, **lora)
    return logits(model, 32)


def _weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapters.merge(model).state_dict().items()}


def test_a_chosen_adapter_classifies_as_it_does_alone(vit: Path, tmp_path: Path) -> None:
    expected = {
        "one": _write(tmp_path / "1", vit, 1, lora_r=4),
        "two": _write(tmp_path / "2", vit, 2, ["p", "q"], lora_r=2, lora_target_modules=["all-linear"]),
        "a.b c": _write(tmp_path / "3", vit, 3, tuning="head"),
    }
    adapter_set = load_adapter_set({name: tmp_path / str(index) for index, name in enumerate(expected, 1)})
    for name in ("two", "a.b c", "one", "two"):
        classifier = adapter_set.set_adapter(name)
        torch.testing.assert_close(logits(classifier.model, 32), expected[name])
        assert classifier.labels == (["p", "q"] if name == "two" else LABELS)
    assert len({id(classifier.model) for classifier in adapter_set.classifiers.values()}) == 1
    with pytest.raises(UserError, match=r"there is no adapter 'three', only one, two, a\.b c"):
        adapter_set.set_adapter("three")


def test_an_old_adapter_stands_beside_a_new_one(tmp_path: Path) -> None:
    model, _ = write_bundle(tmp_path / "new", OLD / "base", LABELS)
    adapter_set = load_adapter_set({"old": OLD / "peft_0_2", "new": tmp_path / "new"}, str(OLD / "base"))
    torch.testing.assert_close(logits(adapter_set.set_adapter("new").model), logits(model))
    torch.testing.assert_close(
        logits(adapter_set.set_adapter("old").model), expected_of(OLD / "peft_0_2"), rtol=1e-5, atol=1e-5
    )


def test_given_labels_are_for_those_that_have_none(vit: Path, tmp_path: Path) -> None:
    for number, labels in ((1, LABELS), (2, ["p", "q"]), (3, LABELS)):
        _write(tmp_path / str(number), vit, number, labels)
    for name in ("config.json", "base_model.json"):
        (tmp_path / "2" / name).unlink()
    named = {number: tmp_path / number for number in ("1", "2", "3")}
    adapter_set = load_adapter_set(named, labels=["cat", "dog"])
    assert [adapter_set.set_adapter(name).labels for name in named] == [LABELS, ["cat", "dog"], LABELS]
    with pytest.raises(UserError, match=r"--class_names names 3 classes, and the adapter in .*2 has 2"):
        load_adapter_set(named, labels=["cat", "dog", "bird"])
    with pytest.raises(UserError, match=r"--class_names differs from the label map"):
        load_adapter_set({number: tmp_path / number for number in ("1", "3")}, labels=["a", "b", "c"])


def test_adapters_of_different_bases_are_refused(vit: Path, tmp_path: Path) -> None:
    _write(tmp_path / "1", vit, 1)
    _write(tmp_path / "2", make_model(tmp_path / "other", seed=1), 1)
    for load in (load_adapter_set, lambda named: load_weighted_sum(named, [0.5, 0.5])):
        with pytest.raises(UserError, match=r"is not the base that the adapter in .*2 was trained on"):
            load({"1": tmp_path / "1", "2": tmp_path / "2"})


def test_a_label_map_of_another_number_of_classes_is_refused(vit: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        _write(tmp_path / str(number), vit, number)
    names = {str(number): f"class {number}" for number in range(5)}
    edit_json(tmp_path / "2" / "config.json", id2label=names, label2id=None)
    with pytest.raises(UserError, match=r"2 has a head of 3 classes, and names for 5"):
        load_adapter_set({"1": tmp_path / "1", "2": tmp_path / "2"})


def test_a_whole_model_is_no_adapter(vit: Path, tmp_path: Path) -> None:
    _write(tmp_path / "1", vit, 1)
    with pytest.raises(UserError, match="is not an adapter"):
        load_adapter_set({"1": tmp_path / "1", "2": vit})


KINDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"lora_r": 4, "lora_alpha": 8}, {"lora_r": 2, "use_rslora": True}),
    ({"lora_r": 4, "use_rslora": True}, {"lora_r": 2}),
    ({"lora_r": 4}, {"lora_r": 3, "lora_target_modules": ["key", "fc1"]}),
    ({"lora_r": 4}, {"tuning": "head"}),
    ({"tuning": "head"}, {"tuning": "head"}),
    (
        {"lora_r": 4, "lora_rank_pattern": {"query": 2}, "train_norms": True},
        {"lora_r": 2, "lora_alpha_pattern": {"value": 5}, "layers_to_transform": "last:1", "train_norms": True},
    ),
]


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_a_blend_has_the_weighted_mean_of_the_merged_weights(kinds: Any, vit: Path, tmp_path: Path) -> None:
    """w_1 (W + D_1) + w_2 (W + D_2) = W + w_1 D_1 + w_2 D_2, as the weights add up to 1."""
    merged = []
    for number, kind in enumerate(kinds):
        _write(tmp_path / str(number), vit, number, **kind)
        merged.append(_weights(load_classifier(tmp_path / str(number)).model))
    blend = load_weighted_sum({"0": tmp_path / "0", "1": tmp_path / "1"}, [0.7, 0.3])
    before = logits(blend.model, 32)
    weights = _weights(blend.model)
    assert weights.keys() == merged[0].keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, 0.7 * merged[0][name] + 0.3 * merged[1][name], rtol=1e-5, atol=1e-6)
    assert any((merged[0][name] - merged[1][name]).abs().max() > 0.1 for name in weights)
    merged_model = load_base(str(vit), LABELS).model
    merged_model.load_state_dict(weights)
    torch.testing.assert_close(logits(merged_model, 32), before, rtol=1e-4, atol=1e-4)


def test_an_average_of_three_is_that_of_their_products_not_of_their_factors(vit: Path, tmp_path: Path) -> None:
    named = {str(number): tmp_path / str(number) for number in range(3)}
    for number, directory in enumerate(named.values()):
        _write(directory, vit, number, lora_r=2)
    merged = [_weights(load_classifier(directory).model) for directory in named.values()]
    for name, tensor in _weights(load_weighted_sum(named, [1 / 3] * 3).model).items():
        expected = torch.stack([weights[name] for weights in merged]).mean(dim=0)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.0, 1.0]])
def test_a_blend_of_one_is_that_one(architecture: Path, weights: list[float], tmp_path: Path) -> None:
    size = 64 if architecture.name == "mobilevit" else 32
    for number in (0, 1):
        _write(tmp_path / str(number), architecture, number, lora_r=2 + number)
    expected = logits(load_classifier(tmp_path / str(weights.index(1.0))).model, size)
    blend = load_weighted_sum({"0": tmp_path / "0", "1": tmp_path / "1"}, weights)
    torch.testing.assert_close(logits(blend.model, size), expected, rtol=1e-4, atol=1e-4)


def test_adapters_of_two_releases_blend() -> None:
    names = ("peft_0_2", "peft_0_14_patterns")
    blend = load_weighted_sum({name: OLD / name for name in names}, [0.25, 0.75], str(OLD / "base"))
    merged = [_weights(load_classifier(OLD / name, str(OLD / "base")).model) for name in names]
    for name, tensor in _weights(blend.model).items():
        torch.testing.assert_close(tensor, 0.25 * merged[0][name] + 0.75 * merged[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "lora", "words"),
    [
        (["z", "y", "x"], {}, "different label maps"),
        (["x", "y"], {}, "different label maps"),
        (LABELS, {"use_dora": True}, "uses DoRA"),
        (LABELS, {"lora_bias": "all"}, "trains biases; load it alone"),
    ],
)
def test_what_has_no_weighted_sum_is_refused(
    labels: list[str], lora: dict[str, Any], words: str, vit: Path, tmp_path: Path
) -> None:
    _write(tmp_path / "1", vit, 1)
    _write(tmp_path / "2", vit, 2, labels, **lora)
    with pytest.raises(UserError, match=words):
        load_weighted_sum({"1": tmp_path / "1", "2": tmp_path / "2"}, [0.5, 0.5])


@pytest.mark.parametrize("lora", [{"lora_r": 4, "use_rslora": True}, {"lora_bias": "all"}], ids=str)
def test_a_scale_is_that_of_the_update_and_not_of_the_head(lora: dict[str, Any], vit: Path, tmp_path: Path) -> None:
    _write(tmp_path / "1", vit, 1, **lora)
    trained = _weights(load_classifier(tmp_path / "1").model)
    scaled, without = (load_classifier(tmp_path / "1").model for _ in range(2))
    adapters.scale_update(scaled, 0.25)
    adapters.scale_update(without, 0)
    base = load_base(str(vit), LABELS).model.state_dict()
    start = _weights(without)
    for name, tensor in _weights(scaled).items():
        torch.testing.assert_close(tensor, start[name] + 0.25 * (trained[name] - start[name]), rtol=1e-5, atol=1e-6)
        is_adapted = not torch.equal(start[name], trained[name])
        assert is_adapted == (name.endswith(("q_proj.weight", "v_proj.weight")))
        if is_adapted:
            torch.testing.assert_close(start[name], base[name])


def test_what_has_no_plain_update_cannot_be_scaled(vit: Path, tmp_path: Path) -> None:
    for name, kind, words in (("dora", {"use_dora": True}, "DoRA"), ("head", {"tuning": "head"}, "only the head")):
        _write(tmp_path / name, vit, 1, **kind)
        with pytest.raises(UserError, match=words):
            adapters.scale_update(load_classifier(tmp_path / name).model, 0.5)


@pytest.mark.parametrize("indices", [(1, 2), (2, 1)])
def test_an_adapter_that_trains_biases_stands_alone(indices: tuple[int, int], vit: Path, tmp_path: Path) -> None:
    """They are the base's own, and would stay when another adapter is chosen."""
    _write(tmp_path / "1", vit, 1)
    _write(tmp_path / "2", vit, 2, lora_bias="lora_only")
    with pytest.raises(UserError, match="trains biases; load it alone"):
        load_adapter_set({str(index): tmp_path / str(index) for index in indices})


def test_adapters_that_bring_different_modules_whole_are_not_blended(vit: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        _write(tmp_path / str(number), vit, number)
    more = {f"base_model.model.vit.layernorm.{part}": torch.ones(32) for part in ("weight", "bias")}
    edit_tensors(tmp_path / "2" / "adapter_model.safetensors", lambda state: state.update(more))
    edit_json(tmp_path / "2" / "adapter_config.json", modules_to_save=["classifier", "layernorm"])
    with pytest.raises(UserError, match=r"do not train the same modules in full.* vit\.layernorm\.bias"):
        load_weighted_sum({"1": tmp_path / "1", "2": tmp_path / "2"}, [0.5, 0.5])


@pytest.mark.parametrize(
    "load", [load_adapter_set, lambda named: load_weighted_sum(named, [0.5, 0.5])], ids=["each", "blend"]
)
def test_a_key_that_is_missing_from_one_of_them_is_no_module_left_out(load: Any, vit: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        _write(tmp_path / str(number), vit, number)
    file = tmp_path / "2" / "adapter_model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(file).items() if "layers.1.attention.v_proj" not in name}, file
    )
    with pytest.raises(UserError, match=r"missing .*layers\.1\.attention\.v_proj\.lora_A"):
        load({"1": tmp_path / "1", "2": tmp_path / "2"})


def test_adapters_that_see_other_pixels_are_not_blended(vit: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        _write(tmp_path / str(number), vit, number)
    edit_json(tmp_path / "2" / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    with pytest.raises(UserError, match="prepare images differently"):
        load_weighted_sum({"1": tmp_path / "1", "2": tmp_path / "2"}, [0.5, 0.5])


def test_norms_of_one_of_two_adapters_are_not_blended(vit: Path, tmp_path: Path) -> None:
    _write(tmp_path / "1", vit, 1)
    _write(tmp_path / "2", vit, 2, train_norms=True)
    with pytest.raises(UserError, match="do not train the same modules in full"):
        load_weighted_sum({"1": tmp_path / "1", "2": tmp_path / "2"}, [0.5, 0.5])
