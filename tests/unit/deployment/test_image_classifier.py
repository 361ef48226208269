"""Images from Python get the scores of the prediction command, whatever they are passed as and whatever is loaded."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lora_dist_testing.tiny import make_image, make_model, write_bundle
from PIL import Image

import lora_dist
from lora_dist.data.pixels.images import UnreadableImageError
from lora_dist.deployment.classify import Inference, classify
from lora_dist.deployment.export.merge import merge_to
from lora_dist.deployment.export.onnx_export import export
from lora_dist.deployment.image_classifier import ImageClassifier
from lora_dist.errors import UserError
from lora_dist.model.trained.classifier import Classifier, load_classifier
from lora_dist.model.trained.decision import AboveThresholds

LABELS = ["rose", "tulip", "daisy"]


class Deployed(NamedTuple):
    """What one adapter became, by kind, and images of several sizes and modes."""

    things: dict[str, Path]
    files: list[str]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    root = tmp_path_factory.mktemp("deployed")
    things = {name: root / name for name in ("adapter", "merged", "model.onnx", "int8.onnx")}
    write_bundle(things["adapter"], make_model(root / "base", num_labels=3), LABELS, scale=0.5)
    merge_to(load_classifier(things["adapter"]), "adapter", things["merged"], [], 1e-4)
    export(load_classifier(things["adapter"]), things["model.onnx"], [])
    export(load_classifier(things["adapter"]), things["int8.onnx"], [], int8=True)
    files = []
    for number in range(11):
        image = make_image(number % 3, number, (40 + 7 * number, 32))
        path = root / f"{number}.png"
        image.convert(("RGB", "L", "RGBA", "P")[number % 4]).save(path)
        files.append(str(path))
    return Deployed(things, files)


def _of_predict(classifier: Classifier, files: list[str]) -> list[list[dict[str, Any]]]:
    cpu = torch.device("cpu")
    rows = classify(classifier, files, Inference(cpu, batch_size=4, num_workers=0), top_k=3)
    return [[{"label": label, "score": score} for label, score in row.top_k] for row in rows]


def test_nothing_is_printed_of_a_new_head_for_which_the_adapter_has_the_weights(deployed: Deployed) -> None:
    """In a process of its own, since other tests quieten transformers. Its settings are the caller's again."""
    code = (
        "import sys, lora_dist, transformers.utils.logging as logging\n"
        "before = logging.get_verbosity(), logging.is_progress_bar_enabled()\n"
        "lora_dist.load(sys.argv[1])\n"
        "assert before == (logging.get_verbosity(), logging.is_progress_bar_enabled())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(deployed.things["adapter"])], capture_output=True, text=True, check=True
    )
    assert result.stdout + result.stderr == ""


@pytest.mark.parametrize("kind", ["adapter", "merged", "model.onnx", "int8.onnx"])
def test_all_that_predict_takes_gives_its_scores_to_the_bit(kind: str, deployed: Deployed) -> None:
    from lora_dist.deployment.export.onnx_model import load_onnx

    path = deployed.things[kind]
    loaded = load_onnx(path) if kind.endswith(".onnx") else load_classifier(path)
    classifier = lora_dist.load(path, device="cpu")
    assert classifier.labels == LABELS
    assert classifier(deployed.files, top_k=3, batch_size=4) == _of_predict(loaded, deployed.files)


def test_paths_images_and_arrays_are_the_same(deployed: Deployed) -> None:
    classifier = lora_dist.load(deployed.things["adapter"])
    expected = classifier(deployed.files, top_k=3)
    assert classifier([Path(file) for file in deployed.files], top_k=3) == expected
    assert classifier([Image.open(file) for file in deployed.files], top_k=3) == expected
    unpacked = [
        Image.open(file).convert("RGB") if number % 4 == 3 else Image.open(file)
        for number, file in enumerate(deployed.files)
    ]
    assert classifier([np.asarray(image) for image in unpacked], top_k=3) == expected
    mixed = [deployed.files[0], Path(deployed.files[1]), Image.open(deployed.files[2])]
    assert classifier(mixed, top_k=3) == expected[:3]


def test_one_image_gives_one_list_of_scores(deployed: Deployed) -> None:
    classifier = lora_dist.load(deployed.things["adapter"])
    scores = classifier(deployed.files[0])
    assert scores == classifier([deployed.files[0]], batch_size=1)[0]
    assert sorted(score["label"] for score in scores) == sorted(LABELS)
    assert sum(score["score"] for score in scores) == pytest.approx(1)
    assert classifier([]) == []
    assert len(classifier(np.zeros((9, 7), dtype=np.uint8), top_k=1)) == 1


def test_sixteen_bits_of_an_array_are_those_of_a_file(deployed: Deployed, tmp_path: Path) -> None:
    classifier = lora_dist.load(deployed.things["adapter"])
    pixels = (np.asarray(make_image(1, 1).convert("L")).astype(np.uint16)) * 257
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    assert classifier(pixels) == classifier(tmp_path / "deep.png")


@pytest.mark.parametrize(
    ("shape", "dtype"), [((8, 8, 3), "float32"), ((8, 8), "float32"), ((3, 8, 8), "uint8"), ((2, 8, 8, 3), "uint8")]
)
def test_an_array_that_would_be_misread_is_refused(shape: tuple[int, ...], dtype: str, deployed: Deployed) -> None:
    with pytest.raises(UserError, match=r"is no image: expected uint8 \[H, W\]"):
        lora_dist.load(deployed.things["adapter"])(np.zeros(shape, dtype=dtype))


def test_what_cannot_be_classified_or_loaded_is_named(deployed: Deployed, tmp_path: Path) -> None:
    classifier = lora_dist.load(deployed.things["adapter"])
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(UnreadableImageError, match=r"text\.jpg"):
        classifier([deployed.files[0], tmp_path / "text.jpg"])
    with pytest.raises(UserError, match="top_k is 0"):
        classifier(deployed.files[0], top_k=0)
    with pytest.raises(UserError, match="no such"):
        lora_dist.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="no such file"):
        lora_dist.load(tmp_path / "nothing.onnx")
    with pytest.raises(UserError, match="leave base_model and labels out"):
        lora_dist.load(deployed.things["model.onnx"], labels=LABELS)
    with pytest.raises(UserError, match="run on the CPU"):
        lora_dist.load(deployed.things["model.onnx"], device="cuda")


def test_a_model_of_several_labels_answers_with_those_above_their_thresholds(deployed: Deployed) -> None:
    """As `predict` does; `top_k` asks for the highest scores instead."""
    loaded = load_classifier(deployed.things["adapter"])
    classifier = ImageClassifier(replace(loaded, decision=AboveThresholds((0.0, 0.5, 0.6))), torch.device("cpu"))
    for file in deployed.files[:4]:
        every = classifier(file, top_k=3)
        assert [entry["score"] for entry in every] == sorted((entry["score"] for entry in every), reverse=True)
        limits = classifier.thresholds
        assert limits is not None
        assert classifier(file) == [entry for entry in every if entry["score"] >= limits[entry["label"]]]
    names = [[entry["label"] for entry in classifier(file)] for file in deployed.files[:4]]
    assert [[entry["label"] for entry in row] for row in classifier(deployed.files[:4])] == names
    nothing = ImageClassifier(replace(loaded, decision=AboveThresholds((1.0, 1.0, 1.0))), torch.device("cpu"))
    assert nothing(deployed.files[0]) == []
    assert len(nothing(deployed.files[0], top_k=2)) == 2
