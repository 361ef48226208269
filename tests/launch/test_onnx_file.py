"""The prediction command writes an ONNX file, counts what int8 costs, and runs from the file alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from lora_dist_testing.launching import predict
from lora_dist_testing.tiny import make_folder, make_model, write_bundle

from lora_dist.deployment.classify import Inference, classify
from lora_dist.deployment.inputs import find_images
from lora_dist.model.trained.classifier import load_classifier

CLASSES = ("red", "green", "blue")


def test_a_file_is_all_that_is_needed(tmp_path: Path) -> None:
    """Adapter and base are gone when it runs."""
    there, image_folder = tmp_path / "there", make_folder(tmp_path / "photos", classes=CLASSES, per_class=3)
    write_bundle(there / "adapter", make_model(there / "base"), CLASSES, scale=0.5, lora_r=4)
    exact, small = tmp_path / "exact.onnx", tmp_path / "small.onnx"
    images = ("--images", image_folder, "--top_k", 3)
    inference = Inference(torch.device("cpu"), batch_size=4, num_workers=0)
    expected = list(classify(load_classifier(there / "adapter"), find_images([str(image_folder)]), inference, top_k=3))
    written = predict("--adapter", there / "adapter", "--onnx", exact, *images)
    assert re.search(r"wrote \S+exact\.onnx; its logits differ from PyTorch's by \d\.\de-\d\d of", written.stderr)
    quantised = predict("--adapter", there / "adapter", "--onnx", small, "--int8", *images)
    cost = re.search(r"of 9 images, int8 gives (\d) another class than fp32; accuracy on the 9 in", quantised.stderr)
    shutil.rmtree(there)
    read = predict("--onnx", exact, *images)
    assert read.stdout == written.stdout
    for row, other in zip(map(json.loads, read.stdout.splitlines()), expected, strict=True):
        assert row["path"] == other.path
        assert [(entry["label"], pytest.approx(entry["score"], abs=1e-5)) for entry in row["top_k"]] == other.top_k
    told = predict("--onnx", small, "--images", image_folder)
    assert "predicting on cpu in int8\n" in told.stderr
    labels = [json.loads(line)["label"] for line in told.stdout.splitlines()]
    assert cost
    assert int(cost[1]) == sum(label != row.top_k[0][0] for label, row in zip(labels, expected, strict=True))
