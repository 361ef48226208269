"""A result is calibrated on validation; what a run computes before, and what goes on from it, is not changed by it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.launching import lines_of, results_of, run_flags
from lora_dist_testing.tiny import make_folder, make_image, make_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import pipeline

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.model.trained.bundle import CALIBRATION, read_calibration
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.train import main

SETTINGS: dict[str, Any] = {
    "max_train_steps": 8,
    "learning_rate": 2e-2,
    "lora_dropout": 0,
    "label_smoothing_factor": 0.5,
}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with 120 validation images, of which every fifth has a wrong label."""
    root = make_folder(tmp_path_factory.mktemp("many") / "train", per_class=8).parent
    make_folder(root / "validation", per_class=40, first=100)
    for label, (name, other) in enumerate(zip("abc", "bca", strict=True)):
        for number in range(100, 140, 5):
            (root / "validation" / name / f"{number}.png").unlink()
            make_image(label, number).save(root / "validation" / other / f"wrong-{number}.png")
    return root


@pytest.fixture(scope="module")
def calibrated(vit: Path, many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "run"
    main(run_flags(vit, many, out, **SETTINGS))
    return out


def test_temperature_and_heat_maps_are_in_bundle_results_card_and_tensorboard(calibrated: Path) -> None:
    results = results_of(calibrated)
    report = results["calibration"]
    assert report["reason"] is None
    assert report["temperature"] != 1
    assert report["loss_after"] < report["loss_before"] == pytest.approx(results_of(calibrated)["eval_loss"], rel=1e-4)
    assert report["calibration_error_before"] == pytest.approx(
        results_of(calibrated)["eval_calibration_error"], rel=1e-4
    )
    assert read_calibration(calibrated / "adapter").temperature == report["temperature"]
    assert [row["min_confidence"] for row in report["coverage"]][:2] == [0, 0.5]
    assert report["coverage"][0] | {"accuracy": 0} == {"min_confidence": 0, "answered": 1, "accuracy": 0}
    card = (calibrated / "adapter" / "README.md").read_text()
    assert f"temperature {report['temperature']:.4g}, which was fitted on 120 validation images" in card
    assert "PEFT alone does not" in card
    assert "![Reliability diagram](reliability.png)" in card
    assert (calibrated / "adapter" / "reliability.png").is_file()
    board = EventAccumulator(str(calibrated / "tensorboard")).Reload()
    assert {"calibration/reliability", "eval/worst", "eval/worst_explained"} <= set(board.Tags()["images"])


def test_training_goes_on_from_a_calibrated_adapter_with_raw_logits(
    calibrated: Path, vit: Path, many: Path, tmp_path: Path
) -> None:
    still = SETTINGS | {"max_train_steps": 1, "learning_rate": 1e-30, "lr_scheduler_type": "constant"}
    main(run_flags(vit, many, tmp_path / "next", adapter_name_or_path=calibrated / "adapter", **still))
    (line,) = [line for line in lines_of(tmp_path / "next") if "eval/loss" in line]
    assert line["eval/loss"] == pytest.approx(results_of(calibrated)["eval_loss"], rel=1e-4)


def test_an_evaluation_alone_is_of_the_calibrated_probabilities(
    calibrated: Path, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--do_eval_only", "--adapter_name_or_path", str(calibrated / "adapter")]
    main([*flags, "--validation_dir", str(many / "validation"), "--output_dir", str(tmp_path)])
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert metrics["eval_accuracy"] == results_of(calibrated)["eval_accuracy"]
    assert metrics["eval_loss"] < results_of(calibrated)["eval_loss"]


def test_a_whole_model_is_calibrated_for_any_program(many: Path, tmp_path: Path) -> None:
    base = make_model(tmp_path / "resnet", "resnet")
    out = tmp_path / "run"
    main(run_flags(base, many, out, tuning="full", **SETTINGS))
    report = results_of(out)["calibration"]
    assert read_calibration(out / "model")._asdict() == {"temperature": 1, "folded": report["temperature"]}
    assert "the probabilities of any program are calibrated" in (out / "model" / "README.md").read_text()
    classifier = load_classifier(out / "model")
    with torch.inference_mode():
        pixels = ImageTransforms(classifier.processor).batch([make_image(0, 0)])
        expected = classifier.probabilities(pixels)[0].tolist()
    served: Any = pipeline("image-classification", model=str(out / "model"), device="cpu")
    found = {entry["label"]: entry["score"] for entry in served(make_image(0, 0))}
    assert found == pytest.approx(dict(zip("abc", expected, strict=True)), rel=1e-4)


def test_few_images_give_no_temperature(vit: Path, photos: Path, tmp_path: Path) -> None:
    main(run_flags(vit, photos, tmp_path / "run", max_train_steps=1))
    adapter = tmp_path / "run" / "adapter"
    assert not (adapter / CALIBRATION).exists()
    assert not (adapter / "reliability.png").exists()
    assert "there are only 9" in results_of(tmp_path / "run")["calibration"]["reason"]
    assert "The probabilities are not calibrated" in (adapter / "README.md").read_text()
