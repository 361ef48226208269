"""The conversion of images goes from training into checkpoints, bundles, merged models and predictions."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lora_dist_testing.launching import rewrite_states, run_flags
from lora_dist_testing.uploads import encoded
from PIL import Image

from lora_dist import train
from lora_dist.data.pixels.conversion import AS_TRANSFORMERS, Conversion
from lora_dist.data.pixels.images import load_rgb
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.deployment.classify import Inference, classify
from lora_dist.deployment.export.merge import merge_to
from lora_dist.errors import UserError
from lora_dist.model.trained.bundle import CONVERSION
from lora_dist.model.trained.classifier import Classifier, load_classifier

ON_WHITE = Conversion((255, 255, 255), all_depths=True)
STEPS = ("--max_train_steps", 2, "--augmentation", "none")
RESUME = ("--resume_from_checkpoint", "auto")


def _run(vit: Path, data: Path, out: Path, *more: object) -> Path:
    settings: dict[str, object] = {"per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
    train.main([*run_flags(vit, data, out, **settings), *map(str, more)])
    return out


def _refused(capfd: pytest.CaptureFixture[str], *run: Any) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        _run(*run)
    assert end.value.code == 2
    return capfd.readouterr().err


def _folders(root: Path, deep: bool = False) -> Path:
    """Black shapes on a transparent background, or 12 bits in 16; without the background, all are black."""
    for split, count in (("train", 6), ("validation", 3)):
        for number in range(2 * count):
            file = root / split / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            shape = np.zeros((32, 32), dtype=bool)
            shape[4 + number :, : 8 + 16 * (number % 2)] = True
            if deep:
                Image.fromarray(np.where(shape, 4095, 16 * number).astype(np.uint16)).save(file)
            else:
                Image.fromarray(np.dstack([np.zeros((32, 32, 3), np.uint8), 255 * shape.astype(np.uint8)])).save(file)
    return root


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folders(tmp_path_factory.mktemp("icons"))


@pytest.fixture(scope="module")
def trained(vit: Path, icons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(vit, icons, tmp_path_factory.mktemp("run"), *STEPS)


def _record(out: Path) -> Any:
    return json.loads((out / "adapter" / CONVERSION).read_text())


def _scores(classifier: Classifier, files: list[str]) -> list[float]:
    inference = Inference(torch.device("cpu"), batch_size=8, num_workers=0)
    return [dict(row.top_k)["a"] for row in classify(classifier, files, inference, top_k=2)]


@torch.inference_mode()
def _expected(classifier: Classifier, files: list[str], conversion: Conversion) -> list[float]:
    pixels = ImageTransforms(classifier.processor).batch([load_rgb(file, conversion=conversion) for file in files])
    return classifier.probabilities(pixels)[:, 0].tolist()


def test_a_run_records_the_white_background_and_prediction_uses_it(trained: Path, icons: Path, tmp_path: Path) -> None:
    assert _record(trained) == ON_WHITE.record()
    files = sorted(map(str, (icons / "validation").rglob("*.png")))
    classifier = load_classifier(trained / "adapter")
    assert classifier.conversion == ON_WHITE
    assert _scores(classifier, files) == pytest.approx(_expected(classifier, files, ON_WHITE), abs=1e-6)
    assert len(set(_scores(classifier, files))) == len(files)
    assert len(set(_expected(classifier, files, AS_TRANSFORMERS))) == 1, "without a background, all are black"
    before = _scores(classifier, files)
    merge_to(classifier, "icons", tmp_path / "merged", files, 1e-3)
    merged = load_classifier(tmp_path / "merged")
    assert merged.conversion == ON_WHITE
    assert _scores(merged, files) == pytest.approx(before, abs=1e-4)


def test_a_bundle_without_a_record_ignores_transparency_and_a_damaged_record_is_refused(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "old")
    (tmp_path / "old" / CONVERSION).unlink()
    assert load_classifier(tmp_path / "old").conversion == AS_TRANSFORMERS
    (tmp_path / "old" / CONVERSION).write_text('{"transparent_background": [1]}')
    with pytest.raises(UserError, match=r"conversion\.json is damaged"):
        load_classifier(tmp_path / "old")


def test_the_server_shows_an_upload_on_the_recorded_background(trained: Path, icons: Path) -> None:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from lora_dist.deployment.serve.request_limits import Limits
    from lora_dist.deployment.serve.server import make_app
    from lora_dist.model.trained.adapter_set import AdapterSet

    file = icons / "validation" / "a" / "0.png"
    classifier = load_classifier(trained / "adapter")
    served = AdapterSet({"x": classifier})
    app = make_app(served, "x", Limits(10**7, 10**7, 4), top_k=2, batch_size=2, device=torch.device("cpu"))
    with TestClient(app) as client:
        answer = client.post("/predict", files=[("files", ("0.png", file.read_bytes(), "image/png"))]).json()
        assert client.post("/predict", files=[("files", ("p.png", encoded(), "image/png"))]).status_code == 200
    scores = {top["label"]: top["score"] for top in answer["predictions"][0]["top_k"]}
    assert scores["a"] == pytest.approx(_scores(classifier, [str(file)])[0], abs=1e-6)


def test_an_onnx_file_has_the_record(trained: Path, icons: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from lora_dist.deployment.export.onnx_export import export
    from lora_dist.deployment.export.onnx_model import load_onnx
    from lora_dist.deployment.export.preprocessing import describe

    files = sorted(map(str, (icons / "validation").rglob("*.png")))
    classifier = load_classifier(trained / "adapter")
    before = _scores(classifier, files)
    export(classifier, tmp_path / "model.onnx", files)
    loaded = load_onnx(tmp_path / "model.onnx")
    assert loaded.conversion == ON_WHITE
    assert _scores(loaded, files) == pytest.approx(before, abs=1e-4)
    assert "transparent pixels on RGB 255 255 255" in describe(
        ImageTransforms(classifier.processor, conversion=ON_WHITE)
    )


def test_a_checkpoint_of_an_older_release_goes_on_to_ignore_transparency(
    vit: Path, icons: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = _run(vit, icons, tmp_path / "old", *STEPS, "--transparent_background", "ignore")
    assert _record(out) == AS_TRANSFORMERS.record()
    rewrite_states(out, lambda state: state["identity"].pop("conversion"))
    _run(vit, icons, out, *STEPS, "--max_train_steps", 3, *RESUME)
    assert _record(out) == AS_TRANSFORMERS.record()
    assert yaml.safe_load((out / "config.yaml").read_text())["transparent_background"] == "ignore"
    assert "transparency is ignored" in capfd.readouterr().err
    error = _refused(capfd, vit, icons, out, *STEPS, "--transparent_background", "black", *RESUME)
    assert "--transparent_background is (0, 0, 0), but the checkpoint has None" in error


def test_a_run_goes_on_with_its_own_background(vit: Path, icons: Path, tmp_path: Path) -> None:
    out = _run(vit, icons, tmp_path / "black", *STEPS, "--transparent_background", "10,20,30")
    _run(vit, icons, out, *STEPS, "--max_train_steps", 3, *RESUME)
    assert _record(out) == Conversion((10, 20, 30), all_depths=True).record()


def test_a_warm_start_keeps_the_adapters_conversion(trained: Path, icons: Path, vit: Path, tmp_path: Path) -> None:
    (trained / "adapter" / CONVERSION).write_text(json.dumps(Conversion((1, 2, 3)).record()))
    more = ("--adapter_name_or_path", trained / "adapter")
    try:
        out = _run(vit, icons, tmp_path / "warm", *STEPS, *more)
        assert _record(out) == Conversion((1, 2, 3)).record()
        out = _run(vit, icons, tmp_path / "black", *STEPS, *more, "--transparent_background", "black")
        assert _record(out) == Conversion((0, 0, 0), all_depths=True).record()
    finally:
        (trained / "adapter" / CONVERSION).write_text(json.dumps(ON_WHITE.record()))


def test_the_range_of_deep_images_is_found_recorded_and_used(vit: Path, tmp_path: Path) -> None:
    data = _folders(tmp_path / "deep", deep=True)
    out = _run(vit, data, tmp_path / "run", *STEPS, "--cache_dir", tmp_path / "cache")
    low, high = _record(out)["pixel_range"]
    assert 0 <= low <= 16
    assert high == 4095
    classifier = load_classifier(out / "adapter")
    files = sorted(map(str, (data / "validation").rglob("*.png")))
    assert _scores(classifier, files) == pytest.approx(
        _expected(classifier, files, Conversion((255, 255, 255), (low, high))), abs=1e-6
    )
    given = _run(vit, data, tmp_path / "given", *STEPS, "--pixel_range", 0, 65535)
    assert _record(given)["pixel_range"] == [0, 65535]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--transparent_background", "blue"), "expected white, black, ignore or three numbers"),
        (("--transparent_background", "0,0,256"), "expected white, black, ignore or three numbers"),
        (("--pixel_range", 5, 5), "expected two ascending numbers"),
        (("--pixel_range", 5), "expected two ascending numbers"),
    ],
)
def test_wrong_values_are_refused(
    given: tuple[object, ...], words: str, icons: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert words in _refused(capfd, Path("vit"), icons, tmp_path / "run", *given)
