"""The training command through real launchers: what it writes, on one process and on two, and how it goes on."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from lora_dist_testing.launching import (
    RESULTS,
    adapter_of,
    flags,
    lines_of,
    results_of,
    scalars_of,
    train,
)
from lora_dist_testing.tiny import make_folder
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lora_dist.data.pixels.images import load_rgb


def _arguments(vit: Path, photos: Path, out: Path, *more: object) -> list[object]:
    return [
        *flags(model_name_or_path=vit, train_dir=photos / "train", validation_dir=photos / "validation"),
        *flags(output_dir=out, logging_steps=1, learning_rate=5e-3, lora_dropout=0),
        *more,
    ]


BATCH = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--num_train_epochs", 3)


@pytest.fixture(scope="module")
def single(vit: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs of four updates: 27 samples in windows of 8, 8, 8 and 3."""
    out = tmp_path_factory.mktemp("single") / "run"
    train(*_arguments(vit, photos, out, *BATCH, "--checkpointing_steps", 3), launch_file="single.yaml")
    return out


def test_a_run_leaves_what_the_readme_says(single: Path) -> None:
    assert {path.name for path in single.iterdir()} == RESULTS | {"checkpoints", "tensorboard"}
    assert {path.name for path in (single / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_model.json",
        "config.json",
        "conversion.json",
        "preprocessor_config.json",
    }
    results = results_of(single)
    assert results["step"] == 12
    assert results["epoch"] == 3
    assert results["eval_accuracy"] > 0.6
    assert 0 < results["trainable_params"] < results["all_params"]
    assert results["train_samples_per_second"] > 0
    assert results["versions"]["torch"] == torch.__version__.split("+")[0]


def test_the_curves_are_in_tensorboard_and_in_the_json_lines(single: Path) -> None:
    reader = EventAccumulator(str(single / "tensorboard"), size_guidance={"images": 0})
    reader.Reload()
    tags = reader.Tags()
    for name in ("loss", "learning_rate", "grad_norm", "samples_per_second", "data_wait", "peak_memory_mb"):
        assert f"train/{name}" in tags["scalars"]
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "loss", "calibration_error"):
        assert f"eval/{name}" in tags["scalars"]
    assert {"train/inputs", "eval/worst", "eval/confusion_matrix"} <= set(tags["images"])
    assert "settings/text_summary" in tags["tensors"]
    assert "_hparams_/session_start_info" in reader.summary_metadata or "hparam/accuracy" in tags["scalars"]
    lines = [line for line in lines_of(single) if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert scalars_of(single, "train/loss") == [
        (line["step"], pytest.approx(line["train/loss"], rel=1e-5)) for line in lines
    ]


def test_checkpoints_hold_only_what_trains_and_are_kept_to_two_and_the_best(single: Path) -> None:
    kept = sorted(path.name for path in (single / "checkpoints").iterdir())
    best = results_of(single)["best_step"]
    assert kept == sorted({f"step-{step:08d}" for step in (9, 12, best)})
    names = load_file(single / "checkpoints" / kept[-1] / "trained.safetensors").keys()
    assert all("lora_" in name or "modules_to_save" in name for name in names)


def test_plain_peft_loads_the_adapter_and_agrees_with_the_results(single: Path, photos: Path) -> None:
    config = json.loads((single / "adapter" / "config.json").read_text())
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    adapter = json.loads((single / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForImageClassification.from_pretrained(
        adapter["base_model_name_or_path"], num_labels=3, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, single / "adapter").eval()
    processor = AutoImageProcessor.from_pretrained(single / "adapter")
    files = sorted((photos / "validation").rglob("*.png"))
    with torch.inference_mode():
        predicted = [
            "abc"[model(**processor(load_rgb(str(file)), return_tensors="pt")).logits.argmax()] for file in files
        ]
    accuracy = sum(label == file.parent.name for label, file in zip(predicted, files, strict=True)) / len(files)
    assert accuracy == pytest.approx(results_of(single)["eval_accuracy"])


def test_the_model_card_has_the_numbers_and_valid_metadata(single: Path) -> None:
    card = (single / "adapter" / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["pipeline_tag"] == "image-classification"
    assert metadata["library_name"] == "peft"
    assert f"{results_of(single)['eval_accuracy']:.4f}" in card


def test_two_processes_train_as_one_does(single: Path, vit: Path, photos: Path, tmp_path: Path) -> None:
    """The same effective batch, split over processes instead of accumulated, remainders included."""
    out = tmp_path / "run"
    batch = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--num_train_epochs", 3)
    train(*_arguments(vit, photos, out, *batch), launch_file="ddp_cpu.yaml")
    assert results_of(out)["num_processes"] == 2
    for tag in ("train/loss", "eval/loss", "eval/accuracy"):
        assert [value for _, value in scalars_of(out, tag)] == pytest.approx(
            [value for _, value in scalars_of(single, tag)], abs=1e-5
        )
    expected = adapter_of(single)
    for name, tensor in adapter_of(out).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    # Two processes are never equally fast.
    means, slowest = (scalars_of(out, f"train/step_time{which}") for which in ("", "_slowest_rank"))
    assert all(0 < mean < slow for (_, mean), (_, slow) in zip(means, slowest, strict=True))


def test_seven_samples_on_two_processes(vit: Path, tmp_path: Path) -> None:
    """A data set smaller than a batch, of which one process gets more than the other; evaluation counts each once."""
    make_folder(tmp_path / "train", classes=("a", "b"), per_class=(4, 3))
    make_folder(tmp_path / "validation", classes=("a", "b"), per_class=(2, 1), first=50)
    arguments = _arguments(vit, tmp_path, tmp_path / "run", "--max_train_steps", 3)
    train(*arguments, "--per_device_train_batch_size", 16, launch_file="ddp_cpu.yaml")
    results = results_of(tmp_path / "run")
    assert results["epoch"] == 3
    assert results["eval_samples"] == 3
    assert sum(map(sum, _confusion(tmp_path / "run"))) == 3


def _confusion(out: Path) -> list[list[int]]:
    return json.loads((out / "evaluation.json").read_text())["confusion_matrix"]["rows_true_columns_predicted"]


def test_evaluation_of_a_given_adapter(single: Path, photos: Path, tmp_path: Path) -> None:
    result = train(
        *flags(
            do_eval_only=True,
            adapter_name_or_path=single / "adapter",
            validation_dir=photos / "validation",
            output_dir=tmp_path / "eval",
        ),
        launch_file="ddp_cpu.yaml",
    )
    metrics = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
    assert metrics["eval_accuracy"] == pytest.approx(results_of(single)["eval_accuracy"])
    assert metrics["eval_loss"] == pytest.approx(results_of(single)["eval_loss"], abs=1e-5)


def test_settings_saved_with_a_run_repeat_it(single: Path, tmp_path: Path) -> None:
    train("--config", single / "config.yaml", "--output_dir", tmp_path / "run")
    expected = adapter_of(single)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_of(tmp_path / "run").items())


def test_a_bad_image_stops_the_run_and_is_named_whichever_process_meets_it(vit: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "train", per_class=4)
    bad = tmp_path / "train" / "b" / "002.png"
    bad.write_bytes(bad.read_bytes()[:60])
    arguments = _arguments(vit, tmp_path, tmp_path / "run", "--train_val_split", 0.25, *BATCH)
    validation = arguments.index("--validation_dir")
    del arguments[validation : validation + 2]
    result = train(*arguments, launch_file="ddp_cpu.yaml", code=None)
    assert str(bad) in result.stderr
    assert "cannot read an image" in result.stderr


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(vit: Path, photos: Path, tmp_path: Path) -> None:
    more = ("--learning_rate", 1e30, "--max_grad_norm", 0, "--checkpointing_steps", 1)
    result = train(*_arguments(vit, photos, tmp_path / "run", *BATCH, *more), code=1)
    assert "is not finite" in result.stderr
    assert str(photos / "train") in result.stderr
    assert "Traceback" not in result.stderr
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "trained.safetensors").values())
