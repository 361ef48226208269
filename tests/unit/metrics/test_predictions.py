"""Files of predictions: what is written is read, and what cannot be read is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_dist.errors import UserError
from lora_dist.metrics.predictions import (
    FILE,
    Predictions,
    folder_label,
    folder_label_by_predictions,
    no_label,
    predictions_of,
    read_predictions,
    write_predictions,
)
from lora_dist.metrics.report import comparison_lines, paired

SOME = Predictions(
    ["a/1.png", "b/ü \n.png"], ["a", None], ["a", "b"], ["p1", None], ["a", "b"], np.array([[0.75, 0.25], [0.5, 0.5]])
)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_predictions(tmp_path / FILE, SOME, [0.75, None])
    found = read_predictions(tmp_path)
    assert (found.paths, found.predicted, found.given) == (SOME.paths, SOME.predicted, SOME.given)
    assert (found.groups, found.classes) == (SOME.groups, SOME.classes)
    np.testing.assert_array_equal(found.probabilities, SOME.probabilities)
    assert found.select([1]).paths == SOME.paths[1:]


def test_rows_of_predict_are_read_without_those_that_have_an_error(tmp_path: Path) -> None:
    lines = ['{"path": "1.png", "label": "a", "score": 0.9, "top_k": []}', '{"path": "2.png", "error": "empty"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "rows.csv").write_text("path,label,score,error\n1.png,a,0.9,\n2.png,,,empty\n")
    table = {"path": ["1.png", "2.png"], "label": ["a", None], "error": [None, "empty"]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
        found = read_predictions(tmp_path / name)
        assert (found.paths, found.predicted, found.given) == (["1.png"], ["a"], [None])
        assert found.probabilities is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it has no predictions"),
        ("no JSON", "not a file of predictions"),
        ('{"label": "a"}', "entry 1 has no path"),
        ('{"path": "1", "adapter": "x"}\n{"path": "1", "adapter": "y"}', "twice: predict with one adapter at a time"),
    ],
)
def test_other_files_are_refused(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text(text)
    with pytest.raises(UserError, match=problem):
        read_predictions(tmp_path / "file.jsonl")
    with pytest.raises(UserError, match="No such file"):
        read_predictions(tmp_path / "none.jsonl")


def _rows(**predicted: str) -> Predictions:
    rows = ({"path": path.replace("_", "/") + ".png", "label": label} for path, label in predicted.items())
    return predictions_of(rows)


def test_folders_are_labels_if_they_are_classes() -> None:
    two = _rows(a_1="a", b_1="a")
    assert folder_label(two.paths, ["a", "b", "c"])("b/1.png") == "b"
    assert folder_label(["a//1.png", "b//1.png"], ["a", "b"])("a//1.png") == "a"
    assert folder_label(two.paths, ["a", "c"])("a/1.png") is None
    assert folder_label(two.paths[:1], ["a", "b"])("a/1.png") is None
    nested = ["photos/a/monday/1.png", "photos/b/2.png", "photos/b/monday/3.png"]
    assert [folder_label(nested, ["a", "b"])(path) for path in nested] == ["a", "b", "b"]
    assert folder_label([*nested, "photos/other/4.png"], ["a", "b"])(nested[0]) is None


def test_folders_around_all_images_are_no_labels() -> None:
    """Such as the name of a user, or of the folder of one class that contains others."""
    paths = ["/home/a/photos/1.png", "/home/a/photos/b/2.png"]
    assert folder_label(paths, ["a", "b"]) is no_label
    within = ["/home/a/photos/a/1.png", "/home/a/photos/b/2.png"]
    assert [folder_label(within, ["a", "b"])(path) for path in within] == ["a", "b"]
    both = [predictions_of([{"path": path, "label": label} for path in paths]) for label in ("a", "b")]
    assert folder_label_by_predictions(*both) is no_label


def test_a_class_that_is_never_predicted_counts_as_one() -> None:
    """Without it, only images of predicted classes would be compared."""
    label_of = folder_label_by_predictions(_rows(a_1="a", b_1="a", c_1="b"), _rows(a_1="a", b_1="a", c_1="a"))
    assert label_of("c/1.png") == "c"
    label_of = folder_label_by_predictions(_rows(a_x_1="a", b_1="a", c_1="b"), _rows(a_x_1="a", b_1="a", c_1="a"))
    assert [label_of(path) for path in ("a/x/1.png", "c/1.png")] == ["a", "c"]
    nested = {"a_x_1": "a", "a_y_1": "b", "b_x_1": "b", "b_y_1": "b", "c_x_1": "a", "c_y_1": "b"}
    label_of = folder_label_by_predictions(_rows(**nested), _rows(**nested))
    assert label_of("a/x/1.png") is None
    label_of = folder_label_by_predictions(_rows(a_1="a", misc_1="b"), _rows(a_1="a", misc_1="a"))
    assert label_of("a/1.png") is None


def test_several_labels_are_read_from_every_format(tmp_path: Path) -> None:
    """With scores where the rows have those of all labels, and without a score of some."""
    scored = [{"label": "dog", "score": 0.9}, {"label": "cat", "score": 0.6}]
    rows = [{"path": "1.png", "labels": scored, "top_k": scored}, {"path": "2.png", "labels": [], "top_k": scored[1:]}]
    rows += [{"path": "3.png", "error": "empty"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rows.csv").write_text("path,labels,label_1,score_1,error\n1.png,dog;cat,dog,0.9,\n2.png,,cat,0.2,\n")
    table = {"path": ["1.png", "2.png"], "labels": [scored, []], "label": [None, None], "error": [None, None]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
        found = read_predictions(tmp_path / name)
        assert found.multi_label
        assert (found.paths, found.predicted, found.given) == (["1.png", "2.png"], [("cat", "dog"), ()], [None, None])
        assert found.probabilities is None
    whole = [{"path": f"{number}.png", "labels": [], "top_k": scored[::step]} for number, step in enumerate((1, -1))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, whole)))
    found = read_predictions(tmp_path / "rows.jsonl")
    assert found.classes == ["cat", "dog"]
    np.testing.assert_array_equal(found.probabilities, [[0.6, 0.9]] * 2)


def test_a_file_of_several_labels_is_read_as_it_was_written(tmp_path: Path) -> None:
    scores = np.array([[0.75, 0.5], [np.nan, np.nan]])
    written = Predictions(
        ["1.png", "2.png"], [("cat", "dog"), ()], [(), ("dog",)], ["p", None], ["cat", "dog"], scores, True
    )
    write_predictions(tmp_path / FILE, written)
    assert "NaN" not in (tmp_path / FILE).read_text(), "which is no JSON"
    found = read_predictions(tmp_path)
    assert (found.predicted, found.given, found.groups) == (written.predicted, written.given, written.groups)
    np.testing.assert_array_equal(found.probabilities, scores)


def test_scores_are_written_so_that_the_order_of_images_stays(tmp_path: Path) -> None:
    """Also those near 0, of rare labels, and near 1, of a confident model."""
    scores = np.array([[1e-9, 1 - 6e-8], [2e-9, 1 - 1.2e-7], [3e-8, 0.1]], dtype=np.float32)
    names = ["1.png", "2.png", "3.png"]
    write_predictions(tmp_path / FILE, Predictions(names, [()] * 3, [()] * 3, [None] * 3, ["a", "b"], scores, True))
    found = read_predictions(tmp_path)
    assert found.probabilities is not None
    np.testing.assert_array_equal(found.probabilities.astype(np.float32), scores)


@pytest.mark.parametrize("multi_label", [False, True])
def test_groups_of_one_of_two_files_are_those_of_both(multi_label: bool) -> None:
    """Twenty copies of five images, of which one model says more right: five groups cannot show that it is better."""
    right: Any = ("a",) if multi_label else "a"
    wrong: Any = ("b",) if multi_label else "b"
    paths, groups = [f"{n}.png" for n in range(100)], [f"patient {n % 5}" for n in range(100)]
    first = Predictions(paths, [right] * 100, [right] * 100, list(groups), [], None, multi_label)
    second = Predictions(paths, [wrong] * 60 + [right] * 40, [None] * 100, [None] * 100, [], None, multi_label)
    for pair in ((first, second), (second, first)):
        lines = list(comparison_lines(paired(*pair), ("one", "two"), no_label))
        assert "group" in lines[-1]
        assert float(lines[-1].split()[2]) > 0.05
    alone = replace(first, groups=[None] * 100)
    assert float(list(comparison_lines(paired(alone, second), ("one", "two"), no_label))[-1].split()[2]) < 0.001


def test_what_is_no_row_of_several_labels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"path": "1.png", "labels": [{"name": "cat"}]}')
    with pytest.raises(UserError, match="not a file of predictions"):
        read_predictions(tmp_path / "rows.jsonl")


def test_probabilities_without_names_of_classes_are_left_out(tmp_path: Path) -> None:
    """Those that `predict --output_type probabilities` writes."""
    (tmp_path / "rows.jsonl").write_text('{"path": "1.png", "label": "a", "probabilities": [0.9, 0.1]}')
    found = read_predictions(tmp_path / "rows.jsonl")
    assert (found.predicted, found.classes, found.probabilities) == (["a"], [], None)


def test_an_unknown_image_keeps_its_most_likely_class(tmp_path: Path) -> None:
    """That of `predict --min_confidence`, whose evaluation is of the classes as well."""
    line = '{"path": "1.png", "label": "unknown", "score": 0.4, "top_k": [{"label": "a", "score": 0.4}]}'
    (tmp_path / "rows.jsonl").write_text(line)
    top_k = [[{"label": "a", "score": 0.4}]]
    pq.write_table(pa.table({"path": ["1.png"], "label": ["unknown"], "top_k": top_k}), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        assert read_predictions(tmp_path / name).predicted == ["a"]


def test_an_unknown_image_without_its_class_is_refused(tmp_path: Path) -> None:
    """As a class of its own it would count as wrong. In the file of a run, "unknown" is a class of the data."""
    (tmp_path / "rows.csv").write_text("path,label,score,error\n1.png,a,0.9,\n2.png,unknown,0.4,\n")
    (tmp_path / "rows.jsonl").write_text('{"path": "1.png", "label": "unknown", "score": 0.4, "logits": [0.1, 0.2]}')
    for name in ("rows.csv", "rows.jsonl"):
        with pytest.raises(UserError, match=r"png is labelled 'unknown'.* without --min_confidence"):
            read_predictions(tmp_path / name)
    (tmp_path / FILE).write_text('{"path": "1.png", "given_label": "unknown", "label": "unknown", "score": 0.4}')
    assert read_predictions(tmp_path).predicted == ["unknown"]
