"""Predictions of the command against labels and other predictions, with an adapter whose classes are folders."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lora_dist_testing.launching import flags
from lora_dist_testing.tiny import write_bundle
from PIL import Image
from sklearn import metrics as sklearn

from lora_dist.compare import main as compare
from lora_dist.errors import UserError
from lora_dist.model.trained.bundle import Records, write_adapter
from lora_dist.model.trained.decision import AboveThresholds
from lora_dist.predict import predict


@pytest.fixture(scope="module")
def adapter(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundles") / "adapter"
    write_bundle(directory, vit, ("a", "b", "c"), seed=3, scale=0.5, lora_r=4)
    return directory


@pytest.fixture(scope="module")
def rows(adapter: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictions for the 27 training photos."""
    out = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    predict(["--adapter", str(adapter), "--images", str(photos / "train"), "--output", str(out)])
    return out


def _pairs(rows: Path) -> tuple[list[str], list[str]]:
    """Folder and prediction of each row."""
    content = [json.loads(line) for line in rows.read_text().splitlines()]
    return [Path(row["path"]).parent.name for row in content], [row["label"] for row in content]


def test_folders_of_classes_are_evaluated(
    adapter: Path, photos: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.csv"
    predict(["--adapter", str(adapter), "--images", str(photos / "train"), "--output", str(out)])
    said = capsys.readouterr().out
    true, predicted = _pairs(rows)
    accuracy = sklearn.accuracy_score(true, predicted)
    assert f"27 images:\n    accuracy {accuracy:.4f} (95% interval " in said
    assert f"macro F1 {sklearn.f1_score(true, predicted, average='macro', zero_division=0):.4f} (95% interval" in said
    names = sorted({*true, *predicted})
    matrix = sklearn.confusion_matrix(true, predicted, labels=names)
    shown = [line.split() for line in said[said.index("confusion matrix") :].splitlines()[2 : 2 + len(names)]]
    assert shown == [[name, *map(str, row)] for name, row in zip(names, matrix.tolist(), strict=True)]
    report = sklearn.precision_recall_fscore_support(true, predicted, labels=names, zero_division=0)
    assert f"{names[0]}          {report[0][0]:.3f}   {report[1][0]:.3f}  {report[2][0]:.3f}" in said
    with out.open(newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == predicted


def test_the_evaluation_says_what_a_threshold_of_confidence_costs(
    adapter: Path, photos: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the photos are answered; one that cannot be read is none of them."""
    scores = [json.loads(line)["score"] for line in rows.read_text().splitlines()]
    threshold = sorted(scores)[len(scores) // 2]
    answered = [one for one, score in zip(zip(*_pairs(rows), strict=True), scores, strict=True) if score >= threshold]
    accuracy = sum(given == said for given, said in answered) / len(answered)
    shutil.copytree(photos / "train", tmp_path / "train")
    (tmp_path / "train" / "a" / "!.png").write_text("no image")
    command = ["--adapter", str(adapter), "--images", str(tmp_path / "train"), "--output", str(tmp_path / "rows.csv")]
    for given, line in (
        (threshold, f"51.9% of 27 images are answered, with accuracy {accuracy:.4f}"),
        (1, "0.0% of 27 images are answered"),
    ):
        with pytest.raises(SystemExit):
            predict([*command, "--min_confidence", str(given)])
        assert f"with --min_confidence {given:g}: {line}\n" in capsys.readouterr().out


def test_a_single_folder_is_no_set_of_labels(adapter: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict(["--adapter", str(adapter), "--images", str(photos / "train" / "a")])
    assert "accuracy" not in "".join(capsys.readouterr())


def test_labels_of_a_file(adapter: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows go to the standard output and nothing else, so the evaluation goes beside it."""
    for label, place in (("a", 0), ("b", 4)):
        Image.open(photos / "train" / label / f"{place:03d}.png").save(tmp_path / f"{place}.png")
    (tmp_path / "labels.csv").write_text("path,label\n0.png,a\n4.png,b\n")
    images = ["--adapter", str(adapter), "--images", str(tmp_path), "--labels_file", str(tmp_path / "labels.csv")]
    predict(images)
    said = capsys.readouterr()
    assert [json.loads(line)["path"] for line in said.out.splitlines()] == [str(tmp_path / f"{n}.png") for n in (0, 4)]
    assert "2 images:\n    accuracy" in said.err
    (tmp_path / "labels.csv").write_text("path,label\n0.png,a\n4.png,rose\n")
    with pytest.raises(UserError, match="labels that are not classes of the model: rose"):
        predict(images)


def test_other_predictions_are_compared(
    adapter: Path, photos: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other file is right on all images, so only images on which this model is wrong differ."""
    true, predicted = _pairs(rows)
    wrong = sum(one != other for one, other in zip(true, predicted, strict=True))
    content = [json.loads(line) for line in rows.read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    right = [{"path": row["path"], "label": label} for row, label in zip(content, true, strict=True)]
    other.write_text("".join(json.dumps(row) + "\n" for row in right[1:]))
    left = wrong - (true[0] != predicted[0])
    predict(
        flags(
            adapter=adapter,
            images=photos / "train",
            compare_to=other,
            output=tmp_path / "rows.jsonl",
            grid=tmp_path / "grid.png",
        )
    )
    said = capsys.readouterr().out
    assert "1 images are in one of the two sets alone, and are left out" in said
    assert f"this model and {other} predict different classes for {left} of 26 images" in said
    assert f"only this model is right on 0, only {other} on {left}\np = {2 * 0.5**left:.4g} by McNemar" in said
    with Image.open(tmp_path / "grid.png") as grid:
        assert np.asarray(grid).std() > 5
    compare([str(rows), str(other)])
    assert f"{rows} and {other} predict different classes for {left} of 26 images" in capsys.readouterr().out
    (tmp_path / "elsewhere.jsonl").write_text('{"path": "x.png", "label": "a"}\n')
    with pytest.raises(SystemExit):
        compare([str(rows), str(tmp_path / "elsewhere.jsonl")])
    assert "no image in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [("compare_to", r"nowhere\.csv: No such file"), ("labels_file", r"--labels_file: no such file: nowhere\.csv")],
)
def test_what_cannot_be_read_is_named_before_a_model_is_loaded(name: str, said: str, photos: Path) -> None:
    with pytest.raises(UserError, match=said):
        predict(["--adapter", "no_model", "--images", str(photos / "train"), f"--{name}", "nowhere.csv"])


@pytest.fixture(scope="module")
def several(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of several labels per image."""
    directory = tmp_path_factory.mktemp("bundles") / "several"
    model, base = write_bundle(directory, vit, ("a", "b", "c"), seed=3, scale=0.5, lora_r=4)
    write_adapter(directory, model, base, "card\n", records=Records(decision=AboveThresholds((0.45, 0.5, 0.55))))
    return directory


def test_several_labels_are_evaluated_by_group_and_compared(
    several: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scores of all labels are measured, and the rows have as many as they were asked for."""
    images = sorted((photos / "train").rglob("*.png"))
    names = [path.relative_to(photos / "train") for path in images]
    given = [("a", "b") if number % 3 else ("c",) if number % 2 else () for number in range(len(images))]
    rows = [
        f"{name},{int('a' in own)},{int('b' in own)},{int('c' in own)},p{n // 3}"
        for n, (name, own) in enumerate(zip(names, given, strict=True))
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["photo,a,b,c,person", *rows]))
    out = tmp_path / "rows.jsonl"
    command = flags(
        adapter=several,
        images=photos / "train",
        labels_file=tmp_path / "labels.csv",
        image_column_name="photo",
        label_column_name="a,b,c",
        output=out,
    )
    predict([*command, "--group_column_name", "person"])
    by_group = capsys.readouterr().out
    whole = tmp_path / "whole.jsonl"
    predict(flags(adapter=several, images=photos / "train", top_k=3, output=whole))
    assert capsys.readouterr().out == ""
    content = [json.loads(line) for line in whole.read_text().splitlines()]
    scores = [{entry["label"]: entry["score"] for entry in row["top_k"]} for row in content]
    true = np.array([[name in own for name in "abc"] for own in given])
    likely = np.array([[by_label[name] for name in "abc"] for by_label in scores])
    chosen = np.array([[name in {entry["label"] for entry in row["labels"]} for name in "abc"] for row in content])
    mean = sklearn.average_precision_score(true, likely, average="macro")
    micro = sklearn.f1_score(true, chosen, average="micro")
    assert f"27 images:\n    mAP {mean:.4f} (95% interval " in by_group
    assert f"micro F1 {micro:.4f} (95% interval " in by_group
    assert "confusion" not in by_group
    assert [len(json.loads(line)["top_k"]) for line in out.read_text().splitlines()] == [1] * 27
    predict(command)
    by_image = capsys.readouterr().out
    assert by_image.splitlines()[1] != by_group.splitlines()[1], "intervals of single images"

    other = tmp_path / "other.jsonl"
    others = [{"path": row["path"], "labels": list(own)} for row, own in zip(content, given, strict=True)]
    other.write_text("".join(json.dumps(row) + "\n" for row in others))
    predict([*command, "--compare_to", str(other), "--grid", str(tmp_path / "grid.png")])
    compared = capsys.readouterr().out
    different = sum(
        {entry["label"] for entry in row["labels"]} != {*own} for row, own in zip(content, given, strict=True)
    )
    assert f"this model and {other} predict different labels for {different} of 27 images" in compared
    assert "by a permutation test of the micro F1, which exchanges the answers for images" in compared
    assert (tmp_path / "grid.png").is_file()
    compare([str(whole), str(other)])
    assert "no paired test: no label is known: compare with the directory of a run" in capsys.readouterr().out
    some = [{"a,b,c": "a,c"}.get(part, part) for part in command]
    with pytest.raises(UserError, match="the model also has the labels b, and it is not known whether the images have"):
        predict(some)


def test_one_class_and_several_labels_are_not_compared(
    adapter: Path, several: Path, photos: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = flags(adapter=several, images=photos / "train" / "a", output=tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="several labels per image, and those predictions one class"):
        predict([*command, "--compare_to", str(rows)])
    predict(command)
    with pytest.raises(SystemExit):
        compare([str(rows), str(tmp_path / "rows.jsonl")])
    assert "rows.jsonl has several labels per image, and the other one class" in capsys.readouterr().err
    with pytest.raises(UserError, match="edit thresholds"):
        predict([*command, "--min_confidence", "0.5"])
