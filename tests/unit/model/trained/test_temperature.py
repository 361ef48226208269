"""The temperature of a bundle: predictions, merged models and ONNX files give the same probabilities with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.tiny import ARCHITECTURES, make_image, make_model, perturb, write_bundle
from transformers import ViTConfig, ViTForImageClassification, pipeline

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.deployment.export.merge import merge_to
from lora_dist.deployment.export.older_peft import export_legacy_names
from lora_dist.deployment.export.onnx_export import export
from lora_dist.deployment.export.onnx_model import load_onnx
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import BaseOptions, load_base
from lora_dist.model.trained.adapter_set import load_adapter_set, load_weighted_sum
from lora_dist.model.trained.bundle import CALIBRATION, Records, read_calibration, write_adapter, write_model
from lora_dist.model.trained.classifier import Classifier, load_classifier
from lora_dist.model.trained.temperature import UNCALIBRATED, Calibration, fold

LABELS = ["x", "y", "z"]
CALIBRATED = Calibration(2.5)
FAST = ("vit", "resnet")


def _adapter(directory: Path, base_model: Path, calibration: Calibration = CALIBRATED, seed: int = 0) -> Path:
    model, base = write_bundle(directory, base_model, LABELS, seed=seed, lora_r=4)
    write_adapter(directory, model, base, "card\n", records=Records(calibration=calibration))
    return directory


@torch.inference_mode()
def _probabilities(classifier: Classifier) -> torch.Tensor:
    images = [make_image(number, number) for number in range(3)]
    return classifier.probabilities(ImageTransforms(classifier.processor).batch(images))


def test_probabilities_are_those_of_the_logits_divided_by_the_temperature(vit: Path, tmp_path: Path) -> None:
    plain = load_classifier(_adapter(tmp_path / "plain", vit, UNCALIBRATED))
    assert not (tmp_path / "plain" / CALIBRATION).exists()
    calibrated = load_classifier(_adapter(tmp_path / "calibrated", vit))
    assert calibrated.calibration == CALIBRATED
    expected = (_probabilities(plain).log() / 2.5).softmax(-1)
    torch.testing.assert_close(_probabilities(calibrated), expected)
    assert (_probabilities(plain) - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in ARCHITECTURES]
)
def test_merged_models_give_the_same_probabilities_in_a_pipeline(name: str, tmp_path: Path) -> None:
    classifier = load_classifier(_adapter(tmp_path / "adapter", make_model(tmp_path / name, name)))
    expected = _probabilities(classifier)
    merge_to(classifier, "x", tmp_path / "merged", [], 1e-4)
    merged = load_classifier(tmp_path / "merged")
    assert merged.calibration == Calibration(1, 2.5)
    torch.testing.assert_close(_probabilities(merged), expected, rtol=1e-3, atol=1e-5)
    served: Any = pipeline("image-classification", model=str(tmp_path / "merged"), device="cpu")
    for number, row in enumerate(expected.tolist()):
        found = {entry["label"]: entry["score"] for entry in served(make_image(number, number))}
        assert found == pytest.approx(dict(zip(LABELS, row, strict=True)), rel=1e-3, abs=1e-5)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "divided by the temperature 2.5" in card


@pytest.mark.parametrize("merged", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["adapter", "merged"])
def test_an_onnx_file_gives_the_same_probabilities(merged: bool, vit: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    classifier = load_classifier(_adapter(tmp_path / "adapter", vit))
    expected = _probabilities(classifier)
    if merged:
        merge_to(classifier, "x", tmp_path / "merged", [], 1e-4)
        classifier = load_classifier(tmp_path / "merged")
    export(classifier, tmp_path / "x.onnx", [])
    loaded = load_onnx(tmp_path / "x.onnx")
    torch.testing.assert_close(_probabilities(loaded), expected, rtol=1e-3, atol=1e-5)
    metadata: Any = loaded.model.session.get_modelmeta().custom_metadata_map
    assert metadata["temperature"].startswith("2.5,")


def test_the_names_of_transformers_4_keep_the_temperature(vit: Path, tmp_path: Path) -> None:
    classifier = load_classifier(_adapter(tmp_path / "adapter", vit))
    expected = _probabilities(classifier)
    export_legacy_names(classifier, "card\n", tmp_path / "old", [])
    torch.testing.assert_close(_probabilities(load_classifier(tmp_path / "old")), expected, rtol=1e-3, atol=1e-5)


def test_each_of_several_adapters_has_its_own_and_their_sum_none(
    vit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = {"a": _adapter(tmp_path / "a", vit), "b": _adapter(tmp_path / "b", vit, Calibration(0.5), seed=1)}
    loaded = load_adapter_set(paths)
    for name, path in paths.items():
        torch.testing.assert_close(_probabilities(loaded.set_adapter(name)), _probabilities(load_classifier(path)))
    assert load_weighted_sum(paths, (0.5, 0.5)).calibration == UNCALIBRATED
    assert "not calibrated" in caplog.text
    same = {"a": paths["a"], "c": _adapter(tmp_path / "c", vit, seed=2)}
    assert load_weighted_sum(same, (0.5, 0.5)).calibration == CALIBRATED


class _Scaled(ViTForImageClassification):
    """Its last layer is no linear one, and has weights for each class all the same."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.classifier = torch.nn.LayerNorm(config.num_labels)


def test_a_head_that_cannot_be_divided_stays_as_it_is(vit: Path) -> None:
    model = _Scaled(ViTConfig.from_pretrained(vit, num_labels=3))
    assert fold(model, CALIBRATED) == CALIBRATED
    assert torch.equal(model.classifier.weight, torch.ones(3))


def test_a_whole_model_has_its_temperature_in_its_head(vit: Path, tmp_path: Path) -> None:
    base = load_base(str(vit), LABELS)
    perturb(base.model)
    write_model(tmp_path / "raw", base.model, base.processor, "card\n", Records(calibration=CALIBRATED))
    remaining = fold(base.model, CALIBRATED)
    assert remaining == Calibration(1, 2.5)
    write_model(tmp_path / "folded", base.model, base.processor, "card\n", Records(calibration=remaining))
    folded, raw = (load_classifier(tmp_path / name) for name in ("folded", "raw"))
    torch.testing.assert_close(_probabilities(folded), _probabilities(raw))


@pytest.mark.parametrize("content", ["{", '{"temperature": 0}', '{"temperature": "x"}', '{"temperature": NaN}', "[]"])
def test_a_damaged_record_is_named(content: str, tmp_path: Path) -> None:
    assert read_calibration(tmp_path) == UNCALIBRATED
    (tmp_path / CALIBRATION).write_text(content)
    with pytest.raises(UserError, match=f"{CALIBRATION} is damaged"):
        read_calibration(tmp_path)


def test_a_pooled_backbone_can_be_divided(tmp_path: Path) -> None:
    make_model(tmp_path / "dinov2", "dinov2")
    base = load_base(str(tmp_path / "dinov2"), LABELS, BaseOptions(pooling="mean"))
    before = base.model.classifier.weight.clone()
    assert fold(base.model, CALIBRATED) == Calibration(1, 2.5)
    torch.testing.assert_close(base.model.classifier.weight, before / 2.5)
