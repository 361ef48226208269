"""Files of predictions: those of a run on its validation images, and those of lora_dist.predict.

Reads both, and writes the first: a line of JSON for each image:

    {"path": "photos/rose/1.jpg", "given_label": "rose", "label": "rose", "score": 0.97}

`label` is the predicted class, null if the logits are not finite. `group` is there where groups are known, and
`probabilities`, by class, in the files of runs with --fold.
"""

import csv
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
        predicted: class of each; None if the model gave none.
        given: label of each in the data; None where it is not known.
        groups: group of each; None where there is none.
        classes: names of the columns of `probabilities`.
        probabilities: of every class, shape [N, K]; None unless the file has them for all images.
    """

    paths: list[str]
    predicted: list[str | None]
    given: list[str | None]
    groups: list[str | None]
    classes: list[str]
    probabilities: np.ndarray | None

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
        UserError: the file cannot be read, is none of predictions, or names an image twice.
    """
    file = predictions_file(name)
    rows: dict[str, Mapping[str, Any]] = {}
    try:
        for number, row in enumerate(_rows(file), start=1):
            if not isinstance(row, Mapping) or not isinstance(row.get("path"), str):
                raise UserError(f"{file}: entry {number} has no path; expected a file that lora_dist.predict writes")
            if row.get("labels") is not None:
                raise UserError(f"{file}: images have several labels; only predictions of one class can be compared")
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
    return predictions_of(kept.values())


def predictions_of(rows: Iterable[Mapping[str, Any]]) -> Predictions:
    """Returns the predictions of rows of a file, without probabilities that have no names of classes."""
    rows = list(rows)
    named = [row["probabilities"] for row in rows if isinstance(row.get("probabilities"), Mapping)]
    classes = sorted({name for by_class in named for name in by_class})
    probabilities = None
    if named and len(named) == len(rows):
        probabilities = np.array([[by_class.get(name, 0.0) for name in classes] for by_class in named])
    return Predictions(
        [row["path"] for row in rows],
        [_class_of(row) for row in rows],
        [row.get("given_label") for row in rows],
        [row.get("group") for row in rows],
        classes,
        probabilities,
    )


def _hides_class(row: Mapping[str, Any]) -> bool:
    """Whether a row of `predict` may have lost its class to --min_confidence, as in a CSV. Rows of a run have not."""
    return row.get("label") == UNKNOWN and not row.get("top_k") and "given_label" not in row


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


def write_predictions(file: Path, predictions: Predictions, scores: Iterable[float | None]) -> None:
    """Writes predictions, with the probability of each predicted class."""
    write_rows(file, (_content(predictions, row, score) for row, score in enumerate(scores)))


def _content(predictions: Predictions, row: int, score: float | None) -> dict[str, Any]:
    content: dict[str, Any] = {
        "path": predictions.paths[row],
        "given_label": predictions.given[row],
        "label": predictions.predicted[row],
        "score": score,
    }
    if predictions.groups[row] is not None:
        content["group"] = predictions.groups[row]
    if predictions.probabilities is not None:
        content["probabilities"] = rounded(predictions.classes, predictions.probabilities[row])
    return content


def rounded(classes: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Returns a row of scores by class, with six decimals."""
    return dict(zip(classes, np.round(values.astype(float), 6).tolist(), strict=True))


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a line of JSON for each row."""
    with file.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def no_label(_: str) -> None:
    """Returns None: no label is known for any image."""
    return None


def folder_label(paths: Iterable[str], classes: Collection[str]) -> Callable[[str], str | None]:
    """Returns the function that gives the label of an image by its path: the name of its folder.

    Folders are labels if there are at least two, and all of them are classes; otherwise, the function is `no_label`.
    """
    folders = {folder_of(path) for path in paths}
    return folder_of if len(folders) > 1 and folders <= set(classes) else no_label


def folder_label_by_predictions(first: Predictions, second: Predictions) -> Callable[[str], str | None]:
    """Returns `folder_label` for two models of which only the predictions are known.

    The classes are the predicted ones. If all of these have folders, the other folders are classes as well.
    """
    predicted = {name for name in (*first.predicted, *second.predicted) if name is not None}
    folders = {folder_of(path) for path in first.paths}
    return folder_label(first.paths, predicted | folders if predicted <= folders else predicted)


def folder_of(path: str) -> str:
    """The name of the folder that a file lies in."""
    return Path(path).parent.name
