"""Files of predictions: those of a run on its validation images, and those of lora_dist.predict.

Reads both, and writes the first: a line of JSON for each image:

    {"path": "photos/rose/1.jpg", "given_label": "rose", "label": "rose", "score": 0.97}

`label` is the predicted class, null if the logits are not finite. `group` is there where groups are known, and
`probabilities`, by class, in the files of runs with --fold. Of several labels:

    {"path": "photos/1.jpg", "given_labels": ["cat"], "labels": ["cat", "dog"], "scores": {"cat": 0.93, "dog": 0.71}}
"""

import csv
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from lora_dist.errors import UserError

FILE = "validation_predictions.jsonl"
"""Name of the file in the directory of a run."""
UNKNOWN = "unknown"
"""Label of an image whose prediction is less confident than --min_confidence."""


@dataclass(frozen=True)
class Predictions:
    """Predictions for N images, in the order of their file.

    Attributes:
        paths: of the images, each once.
        predicted: class of each, None if the model gave none; of several labels, the tuple of them.
        given: label or labels of each in the data; None where they are not known.
        groups: group of each; None where there is none.
        classes: names of the columns of `probabilities`; of several labels, at least these.
        probabilities: of every class, shape [N, K]; None unless the file has them for all images.
        multi_label: whether an image has any number of labels, instead of one class.
    """

    paths: list[str]
    predicted: list[Any]
    given: list[Any]
    groups: list[str | None]
    classes: list[str]
    probabilities: np.ndarray | None
    multi_label: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: list[int]) -> "Predictions":
        """The predictions of some rows, in their order."""
        return replace(
            self,
            paths=[self.paths[row] for row in rows],
            predicted=[self.predicted[row] for row in rows],
            given=[self.given[row] for row in rows],
            groups=[self.groups[row] for row in rows],
            probabilities=None if self.probabilities is None else self.probabilities[rows],
        )


def predictions_file(name: str | Path) -> Path:
    """The file of predictions of a run's directory; the name of a file is returned as it is."""
    path = Path(name)
    return path / FILE if path.is_dir() else path


def read_predictions(name: str | Path) -> Predictions:
    """Reads a file of JSON lines, CSV or parquet, or that of a run's directory, without images that could not be read.

    Raises:
        UserError: the file cannot be read, is not a file of predictions, or names an image twice.
    """
    file = predictions_file(name)
    if file != Path(name) and not file.exists():
        raise UserError(
            f"{name}: the directory has no {FILE}: name that of a finished run, or a file of predictions, such as the "
            f"out_of_fold.jsonl of lora_dist.folds"
        )
    rows: dict[str, Mapping[str, Any]] = {}
    try:
        for number, row in enumerate(_rows(file), start=1):
            if not isinstance(row, Mapping) or not isinstance(row.get("path"), str):
                raise UserError(f"{file}: entry {number} has no path; expected a file that lora_dist.predict writes")
            if row["path"] in rows:
                advice = ": predict with one adapter at a time" if row.get("adapter") else ""
                raise UserError(f"{file}: {row['path']} is in it twice{advice}")
            rows[row["path"]] = row
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from error
    except (UnicodeDecodeError, ValueError, csv.Error) as error:
        raise UserError(f"{file}: not a file of predictions ({error})") from error
    kept = {path: row for path, row in rows.items() if not row.get("error")}
    if not kept:
        raise UserError(f"{file}: it has no predictions")
    if hidden := next((path for path, row in kept.items() if _hides_class(row)), None):
        raise UserError(
            f"{file}: {hidden} is labelled {UNKNOWN!r}, and its most likely class is not in the file: predict without "
            f"--min_confidence, or into JSON Lines or parquet with --output_type top_k"
        )
    try:
        return predictions_of(kept.values())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not a file of predictions ({error!r})") from error


def predictions_of(rows: Iterable[Mapping[str, Any]]) -> Predictions:
    """Returns the predictions of rows of a file, without probabilities that have no names of classes."""
    rows = list(rows)
    multi_label = any(row.get("labels") is not None for row in rows)
    named = [_scores_of(row, multi_label) for row in rows]
    classes = sorted({name for by_class in named for name in by_class or ()})
    probabilities = None
    # Of several labels, `top_k` may have the scores of some of them.
    if rows and all(by_class is not None and not (multi_label and len(by_class) < len(classes)) for by_class in named):
        values = [[(by_class or {}).get(name, 0.0) for name in classes] for by_class in named]
        probabilities = np.array(values, dtype=np.float64)
    return Predictions(
        [row["path"] for row in rows],
        [_names_of(row.get("labels")) if multi_label else _class_of(row) for row in rows],
        [_given_of(row, multi_label) for row in rows],
        [row.get("group") for row in rows],
        classes,
        probabilities,
        multi_label,
    )


def _scores_of(row: Mapping[str, Any], multi_label: bool) -> Mapping[str, float] | None:
    """The scores of a row by class, if they have names. A label whose logits are not finite has none."""
    found = row.get("scores" if multi_label else "probabilities")
    if multi_label and found is None and isinstance(row.get("top_k"), list):
        found = {entry["label"]: entry["score"] for entry in row["top_k"]}
    return found if isinstance(found, Mapping) else None


def _names_of(labels: Any) -> tuple[str, ...]:
    """The labels of a cell in order: names with semicolons between them, a list of names, or one with scores."""
    if isinstance(labels, str):
        labels = labels.split(";")
    return tuple(sorted(one["label"] if isinstance(one, Mapping) else one for one in labels or () if one))


def _given_of(row: Mapping[str, Any], multi_label: bool) -> Any:
    if not multi_label:
        return row.get("given_label")
    return None if row.get("given_labels") is None else _names_of(row["given_labels"])


def _hides_class(row: Mapping[str, Any]) -> bool:
    """Whether a row of `predict` may have lost its class to --min_confidence, as in a CSV. Rows of a run have not."""
    is_complete = row.get("top_k") or "given_label" in row or row.get("labels") is not None
    return row.get("label") == UNKNOWN and not is_complete


def _class_of(row: Mapping[str, Any]) -> str | None:
    """The predicted class, also of an image whose label is 'unknown' because of --min_confidence."""
    likely = row.get("top_k")
    scored = likely[0] if isinstance(likely, list) and likely else row
    return (scored.get("label") if isinstance(scored, Mapping) else row.get("label")) or None


def _rows(file: Path) -> Iterator[Any]:
    if file.suffix.lower() == ".parquet":
        for batch in pq.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
        return
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if file.suffix.lower() == ".csv":
            yield from csv.DictReader(lines)
        else:
            yield from (json.loads(line) for line in lines if line.strip())


def write_predictions(file: Path, predictions: Predictions, scores: Iterable[float | None] | None = None) -> None:
    """Writes a line of JSON for each image. `scores` has the probability of each predicted class, of one class each."""
    with file.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as lines:
        for row, score in enumerate([None] * len(predictions) if scores is None else scores):
            lines.write(json.dumps(_content(predictions, row, score), ensure_ascii=False) + "\n")


def _content(predictions: Predictions, row: int, score: float | None) -> dict[str, Any]:
    multi_label = predictions.multi_label
    given, predicted = predictions.given[row], predictions.predicted[row]
    content: dict[str, Any] = {"path": predictions.paths[row]}
    content |= (
        {"given_labels": given, "labels": predicted} if multi_label else {"given_label": given, "label": predicted}
    )
    content |= {} if multi_label else {"score": score}
    if predictions.groups[row] is not None:
        content["group"] = predictions.groups[row]
    if predictions.probabilities is not None:
        # Nine digits tell all float32 apart, so the file ranks images as the run did.
        known = predictions.probabilities[row].tolist()
        values = (float(f"{value:.9g}") if math.isfinite(value) else None for value in known)
        content["scores" if multi_label else "probabilities"] = dict(zip(predictions.classes, values, strict=True))
    return content


def label_matrix(answers: Sequence[Collection[str]], classes: Sequence[str]) -> np.ndarray:
    """Returns whether each image has each of these labels, bool [N, labels], by the names of its labels."""
    number = {name: index for index, name in enumerate(classes)}
    found = np.zeros((len(answers), len(classes)), dtype=bool)
    for row, names in enumerate(answers):
        found[row, [number[name] for name in names]] = True
    return found


def no_label(_: str) -> None:
    """Returns None: no label is known for any image."""
    return None


def folder_label(paths: Collection[str], classes: Collection[str]) -> Callable[[str], str | None]:
    """Returns the function that gives the label of an image by its path, as `class_folder` does.

    Folders are labels if there are at least two, and all images are in such folders; otherwise, it is `no_label`.
    Folders around all of the images are not.
    """
    label_of = partial(class_folder, classes=frozenset(classes), root=common_folder(paths))
    folders = {label_of(path) for path in paths}
    return label_of if len(folders) > 1 and None not in folders else no_label


def common_folder(paths: Iterable[str]) -> str:
    """Returns the innermost folder around all images, as an absolute path; empty if there are no images."""
    folders = {os.path.dirname(path) for path in paths}  # noqa: PTH120
    return os.path.commonpath([os.path.abspath(folder) for folder in folders]) if folders else ""  # noqa: PTH100


def class_folder(path: str, classes: frozenset[str], root: str) -> str | None:
    """Returns the innermost folder around an image that is named after a class, at any depth below `root`, or None."""
    return _class_of_folder(os.path.dirname(path), classes, root)  # noqa: PTH120


@lru_cache(maxsize=4096)
def _class_of_folder(folder: str, classes: frozenset[str], root: str) -> str | None:
    around = Path(os.path.abspath(folder))  # noqa: PTH100
    inside = takewhile(lambda one: str(one) != root, (around, *around.parents))
    return next((one.name for one in inside if one.name in classes), None)


def folder_label_by_predictions(first: Predictions, second: Predictions) -> Callable[[str], str | None]:
    """Returns `folder_label` for two models, from their predictions alone.

    The classes are the predicted ones. If all of these have folders, the other folders are classes as well. Images with
    several labels have none by their folders.
    """
    if first.multi_label or second.multi_label:
        return no_label
    predicted = frozenset(name for name in (*first.predicted, *second.predicted) if name is not None)
    root = common_folder(first.paths)
    folders = {path: class_folder(path, predicted, root) for path in first.paths}
    others = frozenset(Path(path).parent.name for path, folder in folders.items() if folder is None)
    # A name that is also that of a folder inside a class is no class.
    nested = any(class_folder(path, others, root) for path, folder in folders.items() if folder is not None)
    all_have_folders = predicted <= set(folders.values()) and not nested
    return folder_label(first.paths, predicted | others if all_have_folders else predicted)
