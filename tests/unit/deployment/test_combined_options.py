"""Options and kinds of models that meet in one prediction."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from lora_dist_testing.backbones import make_backbone
from lora_dist_testing.launching import flags
from lora_dist_testing.tiny import write_bundle
from lora_dist_testing.uploads import encoded
from PIL import Image

from lora_dist.deployment import parts, prediction
from lora_dist.deployment.serve import server
from lora_dist.deployment.serve.request_limits import Limits
from lora_dist.errors import UserError
from lora_dist.model.trained.adapter_set import AdapterSet
from lora_dist.model.trained.bundle import Records, write_adapter
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.model.trained.decision import AboveThresholds
from lora_dist.model.trained.temperature import Calibration
from lora_dist.predict import predict

LABELS = ("a", "b", "c")


@pytest.fixture(scope="module")
def adapter(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated, of one class per image."""
    directory = tmp_path_factory.mktemp("bundles") / "adapter"
    model, base = write_bundle(directory, vit, LABELS, seed=3, scale=0.5, lora_r=4)
    write_adapter(directory, model, base, "card\n", records=Records(calibration=Calibration(2.0)))
    return directory


@pytest.fixture(scope="module")
def several(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several labels per image."""
    directory = tmp_path_factory.mktemp("bundles") / "several"
    model, base = write_bundle(directory, vit, LABELS, seed=3, scale=0.5, lora_r=4)
    write_adapter(directory, model, base, "card\n", records=Records(decision=AboveThresholds((0.4, 0.5, 0.6))))
    return directory


@pytest.fixture
def images(photos: Path) -> Path:
    """Seven images of one folder."""
    return photos / "train" / "c"


def test_rows_on_the_terminal_in_fp32_come_alone(
    adapter: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(flags(adapter=adapter, images=images, device="cpu"))
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 7
    assert said.err == ""


@pytest.mark.parametrize("kind", ["adapter", "several"])
def test_a_csv_has_no_more_columns_than_the_model_has_classes(
    kind: str, images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "rows.csv"
    predict(flags(adapter=request.getfixturevalue(kind), images=images, output=out, top_k=5))
    with out.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[-3:] == ["label_3", "score_3", "error"]
    assert all(len(row) == len(header) and all(row[:-1]) for row in rows if kind == "adapter")


def test_parts_without_heat_maps_are_not_continued_with_them(
    adapter: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their images would have none."""
    monkeypatch.setattr(prediction, "MAX_IMAGES", 3)
    out = flags(adapter=adapter, images=images, output=tmp_path / "rows.jsonl")
    with monkeypatch.context() as killed:
        killed.setattr(parts.Parts, "remove", lambda _: None)
        predict(out)
    with pytest.raises(UserError, match="another model or settings"):
        predict([*out, "--explain", str(tmp_path / "maps")])


def test_a_server_of_several_labels_has_no_unknown_images(several: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "run", lambda *_: None)
    with pytest.raises(UserError, match="--min_confidence is for models of one class per image"):
        predict([*flags(adapter=several, min_confidence=0.5), "--serve"])


def test_a_server_of_several_labels_explains_the_highest_score(several: Path) -> None:
    models = AdapterSet({"x": load_classifier(several)})
    app = server.make_app(models, "x", Limits(10**6, 10**6, 9), top_k=2, batch_size=4, device=torch.device("cpu"))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        answer = client.post("/explain", files={"file": ("a.png", encoded())})
        page = client.get("/").text
    assert 'data-explains="yes"' in page
    assert "<p>3 labels</p>" in page
    assert answer.headers["content-type"] == "image/png"


def test_a_server_says_why_it_cannot_explain(tmp_path: Path) -> None:
    """GroupViT pools groups of patches: a map of them would be of no place."""
    write_bundle(tmp_path / "adapter", make_backbone(tmp_path / "groupvit", "groupvit"), LABELS)
    models = AdapterSet({"x": load_classifier(tmp_path / "adapter")})
    app = server.make_app(models, "x", Limits(10**6, 10**6, 9), top_k=2, batch_size=4, device=torch.device("cpu"))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        answer = client.post("/explain", files={"file": ("a.png", encoded())})
        assert client.post("/predict", files={"files": ("a.png", encoded())}).status_code == 200
    assert answer.status_code == 501
    assert "its last tokens are learned queries" in answer.json()["detail"]


def test_each_label_of_an_image_is_explained(several: Path, images: Path, tmp_path: Path) -> None:
    """A picture is as wide as the image and its heat maps: one of each label, or of the highest score without any."""
    shutil.copytree(several, tmp_path / "adapter")
    widths = []
    for limit in (0.0, 1.0):
        (tmp_path / "adapter" / "thresholds.json").write_text(json.dumps({"a": limit, "b": 1, "c": limit}))
        maps = tmp_path / f"maps {limit}"
        predict(flags(adapter=tmp_path / "adapter", images=images / "000.png", explain=maps))
        (file,) = maps.iterdir()
        with Image.open(file) as picture:
            widths.append(picture.width)
    assert widths[0] == pytest.approx(1.5 * widths[1], rel=0.05)


def test_a_csv_of_labels_with_semicolons_is_refused_before_images_are_read(
    vit: Path, images: Path, tmp_path: Path
) -> None:
    model, base = write_bundle(tmp_path / "adapter", vit, ("a;b", "c", "d"), seed=3, scale=0.5, lora_r=4)
    write_adapter(tmp_path / "adapter", model, base, "card\n", records=Records(decision=AboveThresholds((1.0,) * 3)))
    with pytest.raises(UserError, match="a CSV has semicolons between labels, and one is called 'a;b'"):
        predict(flags(adapter=tmp_path / "adapter", images=images, output=tmp_path / "rows.csv"))
    assert not (tmp_path / "rows.csv").exists()


def test_a_scaled_update_has_no_temperature_and_unconfirmed_thresholds(
    adapter: Path, several: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both were fitted to the update as it was."""
    logits = {}
    for scale in (1.0, 1.0000001):
        out = tmp_path / f"{scale}.jsonl"
        predict(flags(adapter=adapter, images=images, adapter_scale=scale, output_type="logits", output=out))
        logits[scale] = torch.tensor([json.loads(line)["logits"] for line in out.read_text().splitlines()])
    torch.testing.assert_close(logits[1.0000001], 2 * logits[1.0], rtol=1e-3, atol=1e-4)
    assert "probabilities are not calibrated" in capsys.readouterr().err
    predict(flags(adapter=several, images=images, adapter_scale=0.5, output=tmp_path / "rows.jsonl"))
    assert "the thresholds were chosen without --adapter_scale" in capsys.readouterr().err
