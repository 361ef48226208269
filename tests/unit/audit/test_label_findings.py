"""Labels that are likely wrong in an audit: found by the predictions, shown with pictures, and on a list."""

import json
from pathlib import Path

import numpy as np
import pytest
from lora_dist_testing.tiny import make_folder

from lora_dist.audit.__main__ import main
from lora_dist.data.sources.exclusions import read_exclusions
from lora_dist.metrics.predictions import Predictions, write_predictions


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "photos", per_class=12)


def _predictions(photos: Path, wrong: dict[str, str], relabelled: str = "") -> Path:
    """Predictions that are sure of the folder's class, or of the class in `wrong`."""
    paths = sorted(map(str, photos.rglob("*.png")))[:-1]
    classes = ["a", "b", "c"]
    given = ["c" if path.endswith(relabelled) and relabelled else Path(path).parent.name for path in paths]
    said = [next((new for end, new in wrong.items() if path.endswith(end)), Path(path).parent.name) for path in paths]
    probabilities = np.where(np.array(said)[:, None] == np.array(classes), 0.9, 0.05)
    file = photos.parent / "out_of_fold.jsonl"
    none = [None] * len(paths)
    write_predictions(
        file, Predictions(paths, list(said), list(given), none, classes, probabilities), [0.9] * len(paths)
    )
    return file


def _audit(photos: Path, code: int, *more: object) -> Path:
    out = photos.parent / "audit"
    arguments = ["--train_dir", photos, "--output_dir", out, "--num_workers", 1, *more]
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == code
    return out


def test_likely_wrong_labels_are_shown_and_listed(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _predictions(photos, {"a/003.png": "c", "b/005.png": "a", "b/007.png": "a"}, relabelled="b/007.png")
    out = _audit(photos, 3, "--predictions", file)
    said = capsys.readouterr().out
    assert "warning: labels that are likely wrong: 2" in said
    assert "1 images have no prediction in" in said
    assert "1 images have another label than in" in said
    wrong = {str(photos / "a" / "003.png"), str(photos / "b" / "005.png")}
    assert read_exclusions(out / "likely_wrong.txt") == wrong
    quarantine = (out / "quarantine.txt").read_text()
    assert all(f"#{path}" in quarantine for path in wrong)
    assert not read_exclusions(out / "quarantine.txt")
    found = json.loads((out / "report.json").read_text())["findings"]
    assert sorted(one["message"] for one in found if one["kind"] == "label_issue") == [
        "given a (5%), predicted c (90%)",
        "given b (5%), predicted a (90%)",
    ]
    page = (out / "report.html").read_text()
    section = page[page.index('id="label_issue"') :]
    assert section[: section.index("</section>")].count("data:image/jpeg") == 2


def test_a_poor_model_is_named_as_such(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a list of a third of the images, most are mistakes of the model."""
    wrong = {f"{label}/{number:03d}.png": "c" for label in "ab" for number in range(5)}
    _audit(photos, 3, "--predictions", _predictions(photos, wrong))
    assert "10 of 35 judged images have labels that are likely wrong" in capsys.readouterr().out


def test_other_files_are_refused(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = photos.parent / "predictions.jsonl"
    file.write_text('{"path": "x.png", "label": "a"}\n')
    _audit(photos, 2, "--predictions", file)
    assert "it has no probabilities of every class" in capsys.readouterr().err
    file.write_text('{"path": "x.png", "label": "a", "given_label": "b", "probabilities": {"a": 0.7, "b": 0.3}}\n')
    _audit(photos, 2, "--predictions", file)
    assert "none of its images is in this data" in capsys.readouterr().err
    _audit(photos, 2, "--predictions", photos / "none.jsonl")
    assert "no such file" in capsys.readouterr().err


@pytest.fixture
def sets(photos: Path) -> Path:
    """A file of labels for the photos: `a` shows a, `b` shows a and b, and `c` none of them."""
    shown = {"a": "a", "b": "a;b", "c": ""}
    paths = sorted(photos.rglob("*.png"))
    rows = [f"{path.relative_to(photos)},{shown[path.parent.name]}" for path in paths]
    (photos.parent / "labels.csv").write_text("\n".join(["path,label", *rows]))
    return photos.parent / "labels.csv"


def test_labels_that_are_likely_missing_or_too_many_are_shown_and_listed(
    photos: Path, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted(map(str, photos.rglob("*.png")))
    given = [{"a": ("a",), "b": ("a", "b"), "c": ()}[Path(path).parent.name] for path in paths]
    scores = np.where([["a" in own, "b" in own] for own in given], 0.9, 0.05)
    for end, values in {"a/003.png": (0.9, 0.97), "b/005.png": (0.02, 0.07), "c/007.png": (0.95, 0.05)}.items():
        scores[[path.endswith(end) for path in paths]] = values
    file = photos.parent / "out_of_fold.jsonl"
    write_predictions(file, Predictions(paths, given, given, [None] * len(paths), ["a", "b"], scores, True))
    several = ("--labels_file", sets, "--predictions", file)
    out = _audit(photos, 3, *several, "--problem_type", "multi_label_classification")
    said = capsys.readouterr().out
    assert "warning: labels that are likely wrong: 4" in said
    assert "judged images are listed" not in said
    assert "4 labels are likely wrong" in said
    found = json.loads((out / "report.json").read_text())["findings"]
    assert [(Path(one["files"][0]["path"]).name, one["message"]) for one in found if one["kind"] == "label_issue"] == [
        ("005.png", "a (2%): given, but not predicted"),
        ("003.png", "b (97%): not given, but predicted"),
        ("007.png", "a (95%): not given, but predicted"),
        ("005.png", "b (7%): given, but not predicted"),
    ]
    wrong = {str(photos / name) for name in ("a/003.png", "b/005.png", "c/007.png")}
    assert read_exclusions(out / "likely_wrong.txt") == wrong
    page = (out / "report.html").read_text()
    section = page[page.index('id="label_issue"') :]
    assert section[: section.index("</section>")].count("data:image/jpeg") == 4
    sets.write_text("path,label\na/000.png,a\nb/000.png,b\n")
    _audit(photos, 2, *several)
    assert "several labels per image: add --problem_type multi_label_classification" in capsys.readouterr().err
