"""Runs that go on from an adapter: what they take from it, and what they refuse."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.backbones import make_backbone
from lora_dist_testing.edits import edit_json
from lora_dist_testing.launching import flags, results_of
from lora_dist_testing.old_adapters import OLD, expected_of, logits
from lora_dist_testing.tiny import make_model, write_bundle
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_dist import train
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sources.load import load_data
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import BaseOptions, load_base
from lora_dist.model.lora import adapters
from lora_dist.model.lora.trainable import make_trainable, trained_tensors
from lora_dist.model.trained.bundle import write_adapter
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.model.trained.warm_start import load_warm_start
from lora_dist.settings.train import DataSettings, LoraSettings, ModelSettings, Settings

LABELS = ["x", "y", "z"]


def _write(
    directory: Path, base_model: Path, labels: list[str] = LABELS, tuning: Any = "lora", **lora: Any
) -> dict[str, Tensor]:
    """Writes a bundle, and returns what trained in it."""
    model, _ = write_bundle(directory, base_model, labels, tuning=tuning, **lora)
    return {name: tensor.detach().clone() for name, tensor in trained_tensors(model)}


def _settings(adapter: Path, model: dict[str, Any] | None = None, **lora: Any) -> Settings:
    return Settings(model=ModelSettings(adapter_name_or_path=str(adapter), **(model or {})), lora=LoraSettings(**lora))


def _begin(settings: Settings, labels: list[str]) -> tuple[Any, Settings]:
    settled, base, start = load_warm_start(settings, labels)
    assert start is not None
    model = make_trainable(base, settled.model, settled.lora)
    start.load_into(model)
    return model, settled


SHAPES: list[dict[str, Any]] = [
    {"lora_r": 4, "lora_alpha": 12},
    {"lora_r": 3, "use_rslora": True, "lora_target_modules": ["all-linear"]},
    {"use_dora": True, "lora_bias": "all"},
    {"lora_target_modules": ["layers.1.attention.q_proj"], "lora_bias": "lora_only"},
    {"lora_rank_pattern": {"q_proj": 2}, "lora_alpha_pattern": {"layers.1.attention.v_proj": 3}, "train_norms": True},
    {"layers_to_transform": "last:1", "lora_rank_pattern": {"q_proj": 2}},
]


@pytest.mark.parametrize("lora", SHAPES, ids=str)
def test_the_same_classes_go_on_in_full(lora: dict[str, Any], vit: Path, tmp_path: Path) -> None:
    before = _write(tmp_path, vit, **lora)
    model, settled = _begin(_settings(tmp_path, lora_dropout=0.3), LABELS)
    after = dict(trained_tensors(model))
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name
    assert settled.model.model_name_or_path == str(vit)
    assert settled.lora.lora_dropout == 0.3
    for name, value in lora.items():
        if name not in ("lora_target_modules", "layers_to_transform"):
            assert getattr(settled.lora, name) == value
    # The settings as recorded make the same model again.
    again, _, _ = load_warm_start(settled, LABELS)
    assert again == settled


@pytest.mark.parametrize("labels", [["x", "y"], ["p", "q", "r"], ["a", "b", "c", "d"]])
def test_other_classes_get_a_new_head(labels: list[str], vit: Path, tmp_path: Path) -> None:
    """Also as many classes with other names."""
    before = _write(tmp_path, vit, lora_r=4)
    model, _ = _begin(_settings(tmp_path), labels)
    after = dict(trained_tensors(model))
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        if "lora_" in name:
            assert torch.equal(tensor, before[name])
        else:
            assert len(tensor) == len(labels)
            assert not torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_same_classes_in_another_order_permute_the_head(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path / "adapter", make_model(tmp_path / name, name), lora_r=4)
    expected = logits(load_classifier(tmp_path / "adapter").model, 32)
    with caplog.at_level(logging.INFO):
        model, _ = _begin(_settings(tmp_path / "adapter"), ["z", "x", "y"])
    torch.testing.assert_close(logits(model, 32), expected[:, [2, 0, 1]])
    assert "with its head permuted" in caplog.text
    _, _, straight = load_warm_start(_settings(tmp_path / "adapter"), ["p", "q", "r"])
    _, _, start = load_warm_start(_settings(tmp_path / "adapter"), ["z", "x", "y"])
    assert start is not None
    assert straight is not None
    assert start.fingerprint() == straight.fingerprint(), "checkpoints of earlier versions are resumed"


def test_the_new_head_follows_the_seed(vit: Path, tmp_path: Path) -> None:
    _write(tmp_path, vit)
    heads = []
    for seed in (1, 1, 2):
        settings = _settings(tmp_path)
        settings = settings.model_copy(update={"run": settings.run.model_copy(update={"seed": seed})})
        heads.append(_begin(settings, ["p", "q", "r", "s"])[0].get_base_model().classifier.weight.clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_an_adapter_of_an_old_release_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    given = {"model_name_or_path": str(OLD / "base")}
    labels = ["LABEL_0", "LABEL_1", "LABEL_2"]
    with caplog.at_level(logging.INFO):
        model, settled = _begin(_settings(OLD / "peft_0_2", given), labels)
    torch.testing.assert_close(logits(model), expected_of(OLD / "peft_0_2"), rtol=1e-5, atol=1e-5)
    assert settled.lora.lora_r == 2
    assert settled.lora.lora_target_modules == ["q_proj", "v_proj"]
    assert "with its head" in caplog.text


def test_settings_that_differ_are_told_with_both_values(vit: Path, tmp_path: Path) -> None:
    _write(tmp_path, vit, lora_r=4, lora_alpha=8)
    with pytest.raises(UserError) as caught:
        load_warm_start(
            _settings(tmp_path, lora_r=16, lora_alpha=8, use_dora=True, lora_target_modules=["key"]), LABELS
        )
    message = str(caught.value)
    assert "--lora_r is 16, and that of the adapter is 4" in message
    assert "--use_dora is True, and that of the adapter is False" in message
    assert "--lora_target_modules key selects 2 modules, such as vit.layers.0.attention.k_proj; the adapter" in message
    assert "lora_alpha" not in message
    assert str(tmp_path) in message
    load_warm_start(_settings(tmp_path, lora_r=4, lora_target_modules=["query", "value"]), LABELS)


def test_a_run_goes_on_with_the_pixels_that_the_adapter_was_trained_on(vit: Path, photos: Path, tmp_path: Path) -> None:
    """And hands them over."""
    _write(tmp_path / "adapter", vit, ["a", "b", "c"])
    edit_json(tmp_path / "adapter" / "preprocessor_config.json", image_mean=[0.2, 0.3, 0.4])
    train.main(
        flags(
            adapter_name_or_path=tmp_path / "adapter",
            train_dir=photos / "train",
            validation_dir=photos / "validation",
            output_dir=tmp_path / "run",
            max_train_steps=1,
            learning_rate=1e-30,
        )
    )
    handed_over = json.loads((tmp_path / "run" / "adapter" / "preprocessor_config.json").read_text())
    assert handed_over["image_mean"] == [0.2, 0.3, 0.4]
    evaluated = results_of(tmp_path / "run")["eval_loss"]
    before = load_classifier(tmp_path / "adapter")
    data = load_data(DataSettings(train_dir=str(photos / "train"), validation_dir=str(photos / "validation")), 0)
    pixels = ImageTransforms(before.processor).batch([data.validation.image(row) for row in range(9)])
    with torch.inference_mode():
        logits = before.model(pixel_values=pixels).logits
    assert evaluated == pytest.approx(float(cross_entropy(logits, torch.from_numpy(data.validation.labels))), rel=1e-4)


def test_another_base_is_refused(vit: Path, tmp_path: Path) -> None:
    _write(tmp_path / "adapter", vit)
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="is not the base"):
        load_warm_start(_settings(tmp_path / "adapter", {"model_name_or_path": str(other)}), LABELS)


def test_what_cannot_go_on_is_refused(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        load_warm_start(_settings(tmp_path / "nothing"), LABELS)
    _write(tmp_path / "probe", vit, tuning="head")
    with pytest.raises(UserError, match="no LoRA matrices"):
        load_warm_start(_settings(tmp_path / "probe"), LABELS)
    _write(tmp_path / "last", vit, layers_to_transform="last:1", lora_rank_pattern={"q_proj": 2})
    same: dict[str, Any] = {"layers_to_transform": [1], "lora_rank_pattern": {"layers.1.attention.query": 2}}
    load_warm_start(_settings(tmp_path / "last", **same), LABELS)
    with pytest.raises(UserError, match="--layers_to_transform 0,1 selects 4 modules"):
        load_warm_start(_settings(tmp_path / "last", layers_to_transform=[0, 1]), LABELS)
    with pytest.raises(UserError, match=r"--lora_rank_pattern is .* and that of the adapter is"):
        load_warm_start(_settings(tmp_path / "last", lora_rank_pattern={"q_proj": 3}), LABELS)
    with pytest.raises(UserError, match="--train_norms is True, and that of the adapter is False"):
        load_warm_start(_settings(tmp_path / "last", train_norms=True), LABELS)


def test_an_adapter_of_an_old_release_with_patterns_goes_on() -> None:
    given = {"model_name_or_path": str(OLD / "base")}
    settings = _settings(OLD / "peft_0_14_patterns", given)
    _, _, start = load_warm_start(settings, LABELS)
    assert start is not None
    labels = [f"c{number}" for number in range(3)]
    model, settled = _begin(settings, labels)
    assert settled.lora.lora_rank_pattern
    assert settled.lora.lora_alpha_pattern
    state = adapters.active_adapter(model).state
    matrices = {name: tensor for name, tensor in start.adapter.state.items() if ".lora_" in name}
    assert matrices
    assert all(torch.equal(state[name], tensor) for name, tensor in matrices.items())


def test_the_fingerprint_is_of_what_is_taken_over(vit: Path, tmp_path: Path) -> None:
    _write(tmp_path / "1", vit, lora_r=4)
    _write(tmp_path / "2", vit, ["p", "q"], lora_r=4)

    def of(directory: Path, labels: list[str]) -> str:
        start = load_warm_start(_settings(directory), labels)[2]
        assert start is not None
        return start.fingerprint()

    assert of(tmp_path / "1", LABELS) == of(tmp_path / "1", LABELS)
    assert of(tmp_path / "1", LABELS) != of(tmp_path / "1", ["new"])
    assert of(tmp_path / "1", ["new"]) != of(tmp_path / "2", ["p", "q"])


def test_without_an_adapter_nothing_changes(vit: Path) -> None:
    settings = Settings(model=ModelSettings(model_name_or_path=str(vit)))
    settled, base, start = load_warm_start(settings, LABELS)
    assert settled is settings
    assert start is None
    assert base.name == str(vit)


def test_an_adapter_goes_on_with_the_targets_that_it_was_given(tmp_path: Path) -> None:
    """SigLIP's tower has a layer whose weights are read, and which LoRA leaves out for this reason."""
    directory = make_backbone(tmp_path / "base", "siglip")
    base = load_base(str(directory), LABELS, BaseOptions(pooling="pooler"))
    everywhere = LoraSettings(lora_r=4, lora_target_modules=["all-linear"])
    write_adapter(tmp_path / "adapter", make_trainable(base, ModelSettings(), everywhere), base, "card\n")
    given = Settings(model=ModelSettings(adapter_name_or_path=str(tmp_path / "adapter")), lora=everywhere)
    assert load_warm_start(given, LABELS)[2] is not None
