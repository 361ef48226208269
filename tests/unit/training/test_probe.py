"""The yardsticks before training are those of scikit-learn on the features of the base."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_dist_testing.launching import results_of, run_flags
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lora_dist import train
from lora_dist.training.probe import NEIGHBOURS, TEMPERATURE, linear_probe, neighbours


def _clusters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of three classes that overlap, on scales of their own, one of them constant."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (count,), generator=generator)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    x = (centres[y] + torch.randn(count, 8, generator=generator)) * torch.tensor([1, 10, 100, 0.1, 1, 1, 1, 0.0])
    return x + 3, y


def test_a_linear_probe_predicts_as_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    (x, y), (asked, _) = _clusters(200, 1), _clusters(300, 2)
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0).clamp(min=1e-9)
    theirs = linear_model.LogisticRegression(max_iter=1000).fit((x - mean) / deviation, y)
    expected = theirs.predict((asked - mean) / deviation)
    assert (linear_probe(x, y, asked, 3).numpy() == expected).mean() > 0.99


def test_neighbours_vote_by_similarity() -> None:
    sklearn_neighbors = pytest.importorskip("sklearn.neighbors")
    (x, y), (asked, _) = _clusters(200, 1), _clusters(1500, 2)
    theirs = sklearn_neighbors.KNeighborsClassifier(
        NEIGHBOURS, metric="cosine", weights=lambda distances: np.exp((1 - distances) / TEMPERATURE)
    ).fit(x, y)
    assert (neighbours(x, y, asked, 3).numpy() == theirs.predict(asked)).mean() > 0.99
    assert neighbours(x[:2], y[:2], asked[:1], 3).shape == (1,)


def _features(base: Path, folder: Path) -> tuple[Tensor, Tensor]:
    """Features of the images in folders of classes, computed by transformers alone."""
    model = AutoModelForImageClassification.from_pretrained(base).eval()
    files = sorted(folder.glob("*/*.png"))
    pixels = AutoImageProcessor.from_pretrained(base)([Image.open(file) for file in files], return_tensors="pt")
    with torch.no_grad():
        features = model.base_model(**pixels).last_hidden_state[:, 0]
    return features, torch.tensor(["abc".index(file.parent.name) for file in files])


def test_a_run_reports_the_yardsticks_beside_its_result(
    vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An image in a wrong folder costs each of them a ninth."""
    data = shutil.copytree(photos, tmp_path / "photos")
    (data / "validation" / "a" / "100.png").rename(data / "validation" / "b" / "200.png")
    arguments = run_flags(vit, data, tmp_path / "run", probe="true", max_train_steps=1)
    train.main(arguments)
    said = capfd.readouterr().err
    (x, y), (asked, y_asked) = (_features(vit, data / name) for name in ("train", "validation"))
    expected = {
        "probe_accuracy": float((linear_probe(x, y, asked, 3) == y_asked).float().mean()),
        "knn_accuracy": float((neighbours(x, y, asked, 3) == y_asked).float().mean()),
    }
    assert json.loads((tmp_path / "run" / "probe.json").read_text()) == pytest.approx(expected)
    results = results_of(tmp_path / "run")
    assert {name: results[name] for name in expected} == pytest.approx(expected)
    words = f"linear probe {expected['probe_accuracy']:.4f}, kNN {expected['knn_accuracy']:.4f}"
    assert f"before training: {words}" in said
    assert f"{words}, LoRA {results['eval_accuracy']:.4f}" in said
    before = (tmp_path / "run" / "probe.json").read_bytes()
    train.main([*arguments, "--max_train_steps", "2", "--resume_from_checkpoint", "auto"])
    assert (tmp_path / "run" / "probe.json").read_bytes() == before
    assert results_of(tmp_path / "run")["probe_accuracy"] == pytest.approx(expected["probe_accuracy"])
