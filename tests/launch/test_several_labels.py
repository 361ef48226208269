"""Several labels end to end: exact over accumulation, processes, engines and resume, and one answer everywhere."""

import csv
import json
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from lora_dist_testing.label_sets import LABELS, make_label_sets
from lora_dist_testing.launching import EVERY_UPDATE, flags, lines_of, results_of, run_flags
from lora_dist_testing.launching import train as launch
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from lora_dist import folds, predict, train
from lora_dist.audit.__main__ import main as audit
from lora_dist.deployment.export.onnx_model import load_onnx
from lora_dist.deployment.serve.request_limits import Limits
from lora_dist.deployment.serve.server import make_app
from lora_dist.metrics.predictions import label_matrix, read_predictions
from lora_dist.model.trained.adapter_set import AdapterSet
from lora_dist.model.trained.classifier import load_classifier

STEPS, MIDDLE = 8, 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return make_label_sets(tmp_path_factory.mktemp("sets"))


def _flags(vit: Path, data: dict[str, object], out: Path, batch: int, accumulation: int) -> list[str]:
    """Two epochs of 27 samples in updates of 8, with all that changes the loss."""
    given: dict[str, object] = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "class_weights": "balanced",
        "label_smoothing_factor": 0.1,
        "mixup_alpha": 1,
        "slice_columns": "site",
        **data,
    }
    return run_flags(vit, Path(), out, **EVERY_UPDATE | given)


@pytest.fixture(scope="module")
def whole(vit: Path, data: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one batch an update."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.main(_flags(vit, data, out, 8, 1))
    return out


def _assert_same(out: Path, expected: Path, first: int = 0) -> None:
    for name in ("train/loss", "train/grad_norm", "eval/loss", "eval/mAP", "eval/micro_f1"):
        found, wanted = (
            {line["step"]: line[name] for line in lines_of(root) if name in line} for root in (out, expected)
        )
        assert found == pytest.approx(
            {step: value for step, value in wanted.items() if step > first}, rel=1e-4, abs=1e-5
        )
    last = f"checkpoints/step-{STEPS:08d}/trained.safetensors"
    for name, tensor in load_file(expected / last).items():
        torch.testing.assert_close(load_file(out / last)[name], tensor, rtol=0, atol=2e-5)


def test_accumulation_is_a_large_batch(vit: Path, data: dict[str, object], whole: Path, tmp_path: Path) -> None:
    train.main(_flags(vit, data, tmp_path / "run", 2, 4))
    _assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "engine", ["ddp", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("fsdp2", marks=pytest.mark.slow)]
)
def test_two_processes_go_on_from_the_middle(
    engine: str, vit: Path, data: dict[str, object], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    checkpoint = f"checkpoints/step-{MIDDLE:08d}"
    shutil.copytree(whole / checkpoint, out / checkpoint)
    launch(*_flags(vit, data, out, 2, 2), "--resume_from_checkpoint", "auto", launch_file=f"{engine}_cpu.yaml")
    _assert_same(out, whole, first=MIDDLE)
    assert results_of(out)["num_processes"] == 2


def test_the_results_say_what_applies(whole: Path) -> None:
    results = results_of(whole)
    assert {name for name in results if name.startswith("eval_")} == {
        "eval_mAP",
        "eval_micro_f1",
        "eval_macro_f1",
        "eval_loss",
        "eval_samples",
        "eval_mAP_interval",
        "eval_micro_f1_interval",
        "eval_macro_f1_interval",
        "eval_slices",
    }
    for name in ("mAP", "micro_f1", "macro_f1"):
        low, high = results[f"eval_{name}_interval"]
        assert low <= results[f"eval_{name}"] <= high
    sites = results["eval_slices"]["site"]
    assert {site: row["num_samples"] for site, row in sites.items()} == {"north": 6, "south": 6}
    assert 0 < results["test_mAP"] <= 1
    evaluation = json.loads((whole / "evaluation.json").read_text())
    assert "confusion_matrix" not in evaluation
    thresholds = json.loads((whole / "adapter" / "thresholds.json").read_text())
    assert evaluation["thresholds"] == thresholds
    assert list(thresholds) == list(LABELS)
    assert json.loads((whole / "adapter" / "config.json").read_text())["problem_type"] == "multi_label_classification"
    card = (whole / "adapter" / "README.md").read_text()
    assert "| class | average precision | precision | recall | F1 | threshold | images |" in card
    assert "accuracy" not in card.partition("## Settings")[0]
    assert f"| eval_mAP | {results['eval_mAP']:.4f} (95% interval " in card
    assert "| column | value | mAP | micro F1 | macro F1 | images |" in card
    assert "| 6 images, fewer than 30 |" in card


def test_the_answer_is_the_same_everywhere(whole: Path, data: dict[str, object], tmp_path: Path) -> None:
    """Of the adapter, the merged model and the ONNX file; by the page's endpoint; and with `pipeline`."""
    adapter, photos = whole / "adapter", Path(str(data["train_dir"]))
    output, merged = tmp_path / "rows.jsonl", tmp_path / "merged"
    predict.main(flags(adapter=adapter, images=photos, output=output, top_k=3, merge_to=merged))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    predict.main(flags(adapter=adapter, images=photos, onnx=tmp_path / "model.onnx", output=tmp_path / "rows.csv"))
    with (tmp_path / "rows.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    thresholds = json.loads((adapter / "thresholds.json").read_text())
    assert json.loads((merged / "thresholds.json").read_text()) == thresholds
    assert len({len(row["labels"]) for row in rows}) > 1
    for row, line in zip(rows, listed, strict=True):
        scores = {entry["label"]: entry["score"] for entry in row["top_k"]}
        above = {label: score for label, score in scores.items() if score >= thresholds[label]}
        assert {entry["label"]: entry["score"] for entry in row["labels"]} == above
        assert [entry["score"] for entry in row["labels"]] == sorted(above.values(), reverse=True)
        assert set(filter(None, line["labels"].split(";"))) == above.keys()
        assert "label" not in row
    for classifier in (load_classifier(adapter), load_onnx(tmp_path / "model.onnx")):
        app = make_app(AdapterSet({"x": classifier}), "x", Limits(10**8, 10**8, 99), top_k=2, batch_size=4, device=CPU)
        with TestClient(app, base_url="http://127.0.0.1") as client:
            files = [("files", (Path(row["path"]).name, Path(row["path"]).read_bytes())) for row in rows[:5]]
            answers: list[dict[str, Any]] = client.post("/predict", files=files).json()["predictions"]
        for answer, row in zip(answers, rows, strict=False):
            assert [entry["label"] for entry in answer["labels"]] == [entry["label"] for entry in row["labels"]]
            assert "score" not in answer
    classify = pipeline("image-classification", model=str(merged), top_k=3)
    found = {entry["label"]: entry["score"] for entry in classify(Image.open(rows[0]["path"]))}
    assert found == pytest.approx({entry["label"]: entry["score"] for entry in rows[0]["top_k"]}, abs=1e-4)


def test_an_evaluation_alone_uses_the_thresholds_of_the_model(
    whole: Path, data: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = flags(adapter_name_or_path=whole / "adapter", output_dir=tmp_path / "again", mixed_precision="no")
    train.main([*flags(**data), *arguments, "--do_eval_only"])
    metrics = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert metrics.keys() >= {"eval_mAP", "eval_mAP_interval"}
    for name, value in metrics.items():
        assert value == pytest.approx(results_of(whole)[name], rel=1e-5)
    one_class = data | {"problem_type": None, "output_dir": tmp_path / "other"}
    with pytest.raises(SystemExit):
        train.main([*flags(**one_class, adapter_name_or_path=whole / "adapter"), "--do_eval_only"])
    assert "was trained with --problem_type multi_label_classification: add it" in capfd.readouterr().err


def test_folds_are_gathered_judged_and_compared(
    vit: Path, data: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every image is validated once, and the audit takes the predictions."""
    unsplit = data | {"labels_file": Path(str(data["labels_file"])).with_name("unsplit.csv")}
    runs = [tmp_path / f"fold-{number}" for number in (1, 2)]
    for number, out in enumerate(runs, start=1):
        train.main(run_flags(vit, Path(), out, **unsplit, fold=f"{number}/2", max_train_steps=2))
    capsys.readouterr()
    folds.main([str(run) for run in runs])
    said = capsys.readouterr().out
    values = [results_of(run)["eval_mAP"] for run in runs]
    assert said.startswith("| | mAP | micro_f1 | macro_f1 | loss |\n")
    titles, numbers = ("mean", "deviation", "fold 1", "fold 2"), (mean(values), stdev(values), *values)
    assert all(f"| {title} | {number:.4f} | " in said for title, number in zip(titles, numbers, strict=True))
    assert "out of fold, 45 images:\n    mAP 0." in said
    gathered = read_predictions(tmp_path / "out_of_fold.jsonl")
    assert sorted(gathered.paths) == sorted(map(str, Path(str(data["train_dir"])).glob("*.png")))
    for run in runs:
        held = label_matrix(read_predictions(run).given, LABELS).sum(axis=0)
        assert held == pytest.approx(label_matrix(gathered.given, LABELS).sum(axis=0) / 2, abs=1)
    with pytest.raises(SystemExit):
        audit(flags(**unsplit, predictions=tmp_path / "out_of_fold.jsonl", output_dir=tmp_path / "audit"))
    assert "labels are likely wrong" in capsys.readouterr().out
    predict.main(
        flags(adapter=runs[0] / "adapter", images=data["train_dir"], compare_to=runs[0], output=tmp_path / "rows.jsonl")
    )
    said = capsys.readouterr().out
    assert f"this model and {runs[0]} predict different labels for 0 of" in said
    assert "p = 1 by a permutation test of the micro F1" in said
