"""Evaluates predictions: against the labels of the images, and against another file of predictions."""

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_dist import demo
from lora_dist.data.sources.label_cells import indicator_columns
from lora_dist.data.sources.labels_file import Listed, read_labels_file
from lora_dist.deployment.classify import Row
from lora_dist.deployment.outputs import GRID_IMAGES
from lora_dist.errors import UserError
from lora_dist.metrics.calibration import coverage
from lora_dist.metrics.predictions import Predictions, folder_label, no_label, read_predictions
from lora_dist.metrics.report import comparison_lines, evaluation_lines, paired, shown
from lora_dist.settings.predict import Images, PredictSettings


class Reference(NamedTuple):
    """Labels of --labels_file and predictions of --compare_to; None where the setting is missing."""

    labels: Listed | None
    predictions: Predictions | None


def read_other_predictions(settings: Images) -> Predictions | None:
    """Reads the file of --compare_to, and checks early that the file of --labels_file can be read.

    Raises:
        UserError: one of them cannot be read.
    """
    if settings.labels_file:
        try:
            Path(settings.labels_file).open("rb").close()
        except OSError as error:
            raise UserError(f"--labels_file {settings.labels_file}: {error.strerror}") from error
    return read_predictions(settings.compare_to) if settings.compare_to else None


def read_labels(settings: PredictSettings, multi_label: bool) -> Listed | None:
    """Reads the file of --labels_file for a model of several labels per image (`multi_label`), or of one class.

    Raises:
        UserError: the file is wrong.
    """
    images = settings.images
    if not images.labels_file:
        return None
    columns = {
        "path": settings.data.image_column_name,
        "label": images.label_column_name,
        "group": images.group_column_name,
    }
    return read_labels_file(demo.local_path(images.images[0]), images.labels_file, columns, multi_label=multi_label)


class Evaluation:
    """Collects the answer for each image, and compares it with labels and with other predictions.

    Labels come from --labels_file. Without it, for one class per image, they are those of `folder_label`.

    Attributes:
        disagreements: the first rows whose answer differs from that of --compare_to, as many as a grid shows.
    """

    def __init__(
        self, settings: Images, reference: Reference, files: Sequence[str], classes: Collection[str], multi_label: bool
    ) -> None:
        """
        Args:
            settings: name the files of `reference`.
            reference: what to compare with.
            files: the images, in order.
            classes: of the model.
            multi_label: whether an image has any number of labels, instead of one class.

        Raises:
            UserError: a label of --labels_file is no class of the model, or --compare_to is of another problem type.
        """
        self._settings = settings
        self._files = files
        self._multi_label = multi_label
        listed, self._other = reference
        if listed is None:
            self._label_of: Callable[[str], Any] = no_label if multi_label else folder_label(files, classes)
            self._groups: Mapping[str, str] = {}
        else:
            _require_classes(settings, listed, classes, multi_label)
            self._label_of = _labels_of(listed, multi_label).get
            self._groups = _groups_of(listed)
        if self._other and self._other.multi_label != multi_label:
            kinds = ("several labels", "one class") if multi_label else ("one class", "several labels")
            raise UserError(
                f"--compare_to {settings.compare_to}: this model has {kinds[0]} per image, and those predictions "
                f"{kinds[1]}"
            )
        self._other_answer = dict(zip(self._other.paths, self._other.predicted, strict=True)) if self._other else {}
        self._known: dict[Any, Any] = {}
        self._answers: dict[str | None, list[Any]] = {}
        self._confidences: dict[str | None, array] = {}
        self._scores: dict[str | None, array] = {}
        self._labels: dict[str | None, list[str]] = {}
        self.disagreements: list[Row] = []

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to compare with."""
        return self._label_of is not no_label or self._other is not None

    def collect(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yields `rows` unchanged, and collects their answers. They are in the order of the files, by adapter.

        With several labels per image, `top_k` of the rows has the scores of all labels.
        """
        for row in rows:
            if self.is_needed:
                self._add(row)
            yield row

    def _add(self, row: Row) -> None:
        answer = _answer(row)
        # One object for all equal answers takes less memory.
        self._answers.setdefault(row.adapter, []).append(self._known.setdefault(answer, answer))
        if answer is None:
            return
        if self._settings.min_confidence is not None:
            self._confidences.setdefault(row.adapter, array("d")).append(row.top_k[0][1])
        if self._multi_label:
            scored = sorted(row.top_k)
            self._labels.setdefault(row.adapter, [label for label, _ in scored])
            self._scores.setdefault(row.adapter, array("f")).extend(score for _, score in scored)
        if answer != self._other_answer.get(row.path, answer) and len(self.disagreements) < GRID_IMAGES:
            self.disagreements.append(row)

    def lines(self) -> Iterator[str]:
        """Yields the results as text, for each adapter."""
        for adapter in self._answers:
            found = self._predictions(adapter)
            if not len(found):
                continue
            if adapter is not None:
                yield f"adapter {adapter}:"
            rows = [row for row, label in enumerate(found.given) if label is not None]
            labelled = found.select(rows)
            if len(labelled):
                yield from evaluation_lines(labelled)
                if self._settings.min_confidence is not None:
                    confidence = np.array(self._confidences[adapter])[rows]
                    yield from _rejection_lines(labelled, confidence, self._settings.min_confidence)
            if len(labelled) < len(found) and self._settings.labels_file:
                yield f"{len(found) - len(labelled):,} images are not in {self._settings.labels_file}"
            if self._other:
                yield ""
                names = ("this model", self._settings.compare_to or "")
                yield from comparison_lines(paired(found, self._other), names, self._label_of)

    def _predictions(self, adapter: str | None) -> Predictions:
        answers, labels = self._answers[adapter], self._labels.get(adapter, [])
        rows = [row for row, answer in enumerate(answers) if answer is not None]
        paths = [self._files[row] for row in rows]
        return Predictions(
            paths=paths,
            predicted=[answers[row] for row in rows],
            given=[self._label_of(path) for path in paths],
            groups=[self._groups.get(path) for path in paths],
            classes=labels,
            probabilities=np.array(self._scores[adapter]).reshape(-1, len(labels)) if labels else None,
            multi_label=self._multi_label,
        )

    def caption(self, row: Row) -> str:
        """Returns the answer for an image, and that of --compare_to."""
        said = ", ".join(f"{label} {score:.0%}" for label, score in row.answer) or "(none)"
        return f"{said}\nother: {shown(self._other_answer[row.path])}"


def _rejection_lines(labelled: Predictions, confidence: np.ndarray, threshold: float) -> Iterator[str]:
    """Yields which share of the labelled images is answered with --min_confidence, and how accurately."""
    correct = np.array(
        [predicted == given for predicted, given in zip(labelled.predicted, labelled.given, strict=True)]
    )
    (row,) = coverage(confidence, correct, [threshold])
    accuracy = "" if row.accuracy is None else f", with accuracy {row.accuracy:.4f}"
    yield ""
    yield f"with --min_confidence {threshold:g}: {row.answered:.1%} of {len(labelled):,} images are answered{accuracy}"


def _answer(row: Row) -> Any:
    """The class of an image, or its labels in order; None for one that cannot be read."""
    if row.error is not None:
        return None
    return row.top_k[0][0] if row.labels is None else tuple(sorted(label for label, _ in row.labels))


def _require_classes(settings: Images, listed: Listed, classes: Collection[str], multi_label: bool) -> None:
    if unknown := sorted(set(listed.classes) - set(classes)):
        raise UserError(
            f"--labels_file {settings.labels_file}: labels that are not classes of the model: {', '.join(unknown)}"
        )
    columns = indicator_columns(settings.label_column_name) if multi_label else []
    if columns and (unnamed := sorted(set(classes) - set(columns))):
        raise UserError(
            f"--label_column_name {settings.label_column_name}: the model also has the labels {', '.join(unnamed)}, "
            f"and it is not known whether the images have them: name a column of each"
        )


def _labels_of(listed: Listed, multi_label: bool) -> dict[str, Any]:
    """The class of each image by its path, or the tuple of its labels in order."""
    names = listed.classes
    answers = (
        tuple(sorted(names[index] for index in label)) if multi_label else names[label] for label in listed.labels
    )
    return dict(zip(listed.paths, answers, strict=True))


def _groups_of(listed: Listed) -> dict[str, str]:
    """The group of each image by its path; empty if every image is a group of its own."""
    is_grouped = len(set(listed.groups)) < len(listed.groups)
    return dict(zip(listed.paths, listed.groups, strict=True)) if is_grouped else {}
