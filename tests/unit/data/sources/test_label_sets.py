"""Several labels of an image: from files and tables, what is wrong with them, and splits that keep each label."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, List, Value
from lora_dist_testing.tiny import make_image

from lora_dist.data.sources.iterative_stratification import (
    iterative_stratification,
    stratified_halves,
    stratified_selection,
)
from lora_dist.data.sources.labels_file import grouped_split
from lora_dist.data.sources.load import ImageData, load_data
from lora_dist.errors import UserError
from lora_dist.settings.train import DataSettings, OptimizationSettings, Settings
from lora_dist.settings.train_contradictions import contradictions

SETS = [("cat",), ("dog", "cat"), (), ("bird",), ("bird", "dog"), ("cat",), ("dog",), ()]
ENCODED = [[0, 1, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
"""Of bird, cat and dog."""
SPLITS = ["train"] * 4 + ["validation"] * 4


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(8):
        make_image(0, number).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


def _load(photos: Path, lines: list[str], **settings: Any) -> ImageData:
    file = photos.parent / "labels.csv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    given = {"problem_type": "multi_label_classification", "allow_missing_classes": True, **settings}
    return load_data(DataSettings(train_dir=str(photos), labels_file=str(file), **given), 42)


def _all(data: ImageData) -> list[list[int]]:
    return [*data.train.labels.tolist(), *data.validation.labels.tolist()]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("delimiter", "mark"), [(",", ";"), ("\t", " ; "), (";", "|")])
@pytest.mark.parametrize("header", [True, False])
def test_a_cell_has_labels_with_a_mark_between_them(
    delimiter: str, mark: str, header: bool, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [[f"{number}.png", mark.join(names), SPLITS[number]] for number, names in enumerate(SETS)]
    lines = [delimiter.join(row) for row in ([["path", "label", "split"]] if header else []) + rows]
    with caplog.at_level("INFO"):
        data = _load(photos, lines)
    assert data.labels == ["bird", "cat", "dog"]
    assert _all(data) == ENCODED
    assert caplog.text.count("2 of 8 images have no label") == 1


def test_a_cell_that_says_missing_is_an_empty_one(photos: Path) -> None:
    """As pandas writes an image without a label."""
    rows = [f"{number}.png,{';'.join(names) or 'nan'},{SPLITS[number]}" for number, names in enumerate(SETS)]
    data = _load(photos, ["path,label,split", *rows])
    assert data.labels == ["bird", "cat", "dog"]
    assert _all(data) == ENCODED


def test_a_column_of_0_and_1_for_each_label_keeps_the_order_given(photos: Path) -> None:
    rows = [
        f"{number}.png,{SPLITS[number]},{','.join(str(float(name in names)) for name in ('bird', 'cat', 'dog', 'cow'))}"
        for number, names in enumerate(SETS)
    ]
    data = _load(photos, ["path,split,bird,cat,dog,cow", *rows], label_column_name="dog,cow, bird")
    assert data.labels == ["dog", "cow", "bird"]
    assert _all(data) == [[row[2], 0, row[0]] for row in ENCODED]


@pytest.mark.parametrize(
    ("lines", "column", "message"),
    [
        (["path,cat,dog", "0.png,1,yes", "1.png,,0"], "cat,dog", "line 2: dog is yes; line 3: cat is empty"),
        (["path,cat,dog", "0.png,1,0"], "cat,cow", "no column cow; the first line has path, cat, dog"),
        (["path,cat,dog", "0.png,1,0"], "cat,cat", "names a column twice"),
        (
            ["path,cat,dog", "0.png,1,0", "1.png,0,1"],
            "cat",
            "has 0 and 1 only, which are no labels. Name a column of 0",
        ),
        (["path,label", "0.png,", "1.png,"], None, "no image has a label"),
        (["path,label", "0.png,cat;dog", "0.png,cat"], None, "files listed twice with different values"),
        (["path,label", "0.png,cat; Cat", "1.png,Cat;Cat;\u200bcat"], None, "class names that look the same"),
    ],
)
def test_what_is_wrong_is_named(lines: list[str], column: str | None, message: str, photos: Path) -> None:
    with pytest.raises(UserError, match=message):
        _load(photos, lines, label_column_name=column)


def test_a_cell_of_several_labels_is_no_class_without_a_word(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without --problem_type, `cat;dog` is the name of one class."""
    lines = ["path,label", "0.png,cat;dog", "1.png,cat;dog", "2.png,cat", "3.png,cat"]
    data = _load(photos, lines, problem_type="single_label_classification")
    assert data.labels == ["cat", "cat;dog"]
    assert "such as cat;dog: if these are several labels, add --problem_type multi_label_classification" in caplog.text


def test_a_file_without_a_mark_between_labels_is_told(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Spaces, commas and lists of Python do not separate labels."""
    data = _load(photos, ["path,label", "0.png,scab rust", *(f"{number}.png,healthy" for number in range(1, 8))])
    assert data.labels == ["healthy", "scab rust"]
    assert "no image has more than one label (such as scab rust); a semicolon separates labels in a cell" in caplog.text


ANIMALS = ClassLabel(names=["dog", "cow", "cat", "bird"])


@pytest.mark.parametrize(
    ("feature", "value_of", "labels"),
    [
        (Value("string"), {name: name for name in ("bird", "cat", "dog")}, ["bird", "cat", "dog"]),
        (ANIMALS, {name: ANIMALS.str2int(name) for name in ("bird", "cat", "dog")}, ["dog", "cow", "cat", "bird"]),
        (Value("int64"), {"bird": 9, "cat": 10, "dog": 2}, ["2", "9", "10"]),
    ],
    ids=["strings", "classes", "numbers"],
)
def test_a_column_of_lists(feature: Any, value_of: dict[str, Any], labels: list[str], tmp_path: Path) -> None:
    rows = [[value_of[name] for name in names] if names else None for names in SETS[:4]]
    rows += [[value_of[name] for name in names] for names in SETS[4:]]
    features = datasets.Features({"image": datasets.Image(), "tags": List(feature)})
    images = [make_image(0, number) for number in range(8)]
    Dataset.from_dict({"image": images, "tags": rows}, features).save_to_disk(tmp_path / "data")
    given: Any = {"dataset_name": str(tmp_path / "data"), "problem_type": "multi_label_classification"}
    data = load_data(DataSettings(allow_missing_classes=True, train_val_split=0.4, **given), 1)
    assert data.labels == labels
    counts = dict(zip(data.labels, np.sum(_all(data), axis=0).tolist(), strict=True))
    name_of = {str(value) if isinstance(feature, Value) else name: name for name, value in value_of.items()}
    assert {name_of.get(label, label): count for label, count in counts.items() if count} == {
        "bird": 2,
        "cat": 3,
        "dog": 3,
    }


def _load_table(directory: Path, columns: dict[str, list[Any]], **settings: Any) -> ImageData:
    size = len(next(iter(columns.values())))
    images = {"image": [make_image(0, number) for number in range(size)]}
    Dataset.from_dict(images | columns).save_to_disk(directory)
    given = {"problem_type": "multi_label_classification", "allow_missing_classes": True, **settings}
    return load_data(DataSettings(dataset_name=str(directory), train_val_split=0.4, **given), 1)


@pytest.mark.parametrize("value_of", [int, bool, float, str])
def test_columns_of_0_and_1_of_a_table(value_of: Any, tmp_path: Path) -> None:
    names = ("dog", "bird", "cat")
    columns = {name: [value_of(int(name in one)) for one in SETS] for name in names}
    data = _load_table(tmp_path / "data", columns, label_column_name="dog,bird")
    assert data.labels == ["dog", "bird"]
    assert sorted(_all(data)) == sorted([row[2], row[0]] for row in ENCODED)
    with pytest.raises(UserError, match="the data set has image, dog, bird, cat"):
        _load_table(tmp_path / "data", columns, label_column_name="dog,cow")
    columns["cat"][3:5] = [None, None]
    with pytest.raises(UserError, match=r"2 values are neither 0 nor 1, rows counted from 0: cat of row 3 \(None\)"):
        _load_table(tmp_path / "data", columns, label_column_name="dog,cat")


def test_lists_of_0_and_1_are_no_lists_of_labels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lists of 0 and 1, such as \[0, 1, 0\], which do not name their labels"):
        _load_table(tmp_path / "data", {"label": ENCODED})


def test_one_class_a_sample_and_blank_labels_are_refused(tmp_path: Path) -> None:
    given: Any = {"dataset_name": str(tmp_path / "data"), "problem_type": "multi_label_classification"}
    table = Dataset.from_dict({"image": [make_image(0, 0)] * 2, "label": ["a", "b"]})
    table.save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match="no column of lists of labels"):
        load_data(DataSettings(**given), 1)
    with pytest.raises(UserError, match="column label holds Value, not a list of labels per sample"):
        load_data(DataSettings(label_column_name="label", **given), 1)
    given["dataset_name"] = str(tmp_path / "blank")
    Dataset.from_dict({"image": [make_image(0, 0)] * 2, "label": [["a", " "], ["b"]]}).save_to_disk(tmp_path / "blank")
    with pytest.raises(UserError, match=r"1 of 2 rows have a blank or unknown label .* row 0"):
        load_data(DataSettings(**given), 1)


def _labels(samples: int, shares: list[float], seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.random((samples, len(shares))) < np.array(shares)).astype(np.uint8)


def test_a_split_has_the_share_of_every_label() -> None:
    labels = _labels(1000, [0.5, 0.2, 0.05, 0.02, 0.4])
    kept, held = stratified_halves(labels, 0.2, seed=3)
    assert sorted([*kept, *held]) == list(range(1000))
    assert len(held) == pytest.approx(200, abs=3)
    assert labels[held].sum(axis=0) == pytest.approx(0.2 * labels.sum(axis=0), abs=1.01)
    assert (labels[held].sum(axis=1) == 0).sum() == pytest.approx(0.2 * (labels.sum(axis=1) == 0).sum(), abs=1.01)
    again = stratified_halves(labels, 0.2, seed=3)
    assert np.array_equal(held, again[1])
    assert not np.array_equal(held, stratified_halves(labels, 0.2, seed=4)[1])


@pytest.mark.parametrize("seed", range(8))
def test_rare_labels_are_on_both_sides(seed: int) -> None:
    """Of two samples with a label, one is held out, also where a random split of a tenth would hold out none."""
    labels = np.zeros((60, 12), np.uint8)
    random = np.random.default_rng(seed)
    for label in range(12):
        labels[random.choice(60, 2, replace=False), label] = 1
    for part in stratified_halves(labels, 0.1, seed):
        assert (labels[part].sum(axis=0) > 0).all()


def test_parts_for_folds() -> None:
    labels = _labels(500, [0.5, 0.2, 0.03])
    parts = iterative_stratification(labels, [0.2] * 5, seed=0)
    for part in range(5):
        assert (parts == part).sum() == pytest.approx(100, abs=3)
        assert labels[parts == part].sum(axis=0) == pytest.approx(0.2 * labels.sum(axis=0), abs=1.5)


def test_a_selection_has_the_number_asked_for() -> None:
    labels = _labels(200, [0.5, 0.1])
    chosen = stratified_selection(labels, 50, seed=0)
    assert len(np.unique(chosen)) == 50
    assert labels[chosen].sum(axis=0) == pytest.approx(labels.sum(axis=0) / 4, abs=3)


def test_groups_stay_together() -> None:
    labels = _labels(300, [0.5, 0.2, 0.1])
    groups = [f"patient {number % 60}" for number in range(300)]
    kept, held = grouped_split(labels, groups, 0.2, seed=0)
    assert not {groups[index] for index in kept} & {groups[index] for index in held}
    assert (labels[held].sum(axis=0) > 0).all()
    assert len(held) == pytest.approx(60, abs=25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(data=DataSettings(train_dir="x", problem_type="multi_label_classification")), "name its labels with"),
        (
            Settings(
                data=DataSettings(
                    dataset_name="x", validation_dir="y", problem_type="multi_label_classification", streaming=True
                ),
                optimization=OptimizationSettings(focal_gamma=1, metric_for_best_model="top5_accuracy"),
            ),
            "the column of splits of --labels_file, not --validation_dir|remove --streaming|remove --focal_gamma|"
            "top5_accuracy is not a metric of multi_label_classification: use mAP, micro_f1, macro_f1 or loss",
        ),
        (
            Settings(optimization=OptimizationSettings(metric_for_best_model="mAP")),
            "mAP is not a metric of single_label_classification",
        ),
    ],
)
def test_what_does_not_go_with_the_problem_type_is_said(settings: Settings, message: str) -> None:
    said = " ".join(problem.message for problem in contradictions(settings))
    assert all(part in said for part in message.split("|"))


def test_the_default_metric_follows_the_problem_type() -> None:
    several = DataSettings(problem_type="multi_label_classification")
    assert Settings(data=several).with_default_metric().optimization.metric_for_best_model == "mAP"
    given = Settings(data=several, optimization=OptimizationSettings(metric_for_best_model="loss"))
    assert given.with_default_metric().optimization.metric_for_best_model == "loss"
    assert Settings().with_default_metric().optimization.metric_for_best_model == "accuracy"
