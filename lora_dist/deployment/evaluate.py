"""Evaluates what is deployed: predictions against the labels of the images, and against another file of predictions."""

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from lora_dist import demo
from lora_dist.data.sources.labels_file import Listed, read_labels_file
from lora_dist.deployment.classify import Row
from lora_dist.deployment.outputs import GRID_IMAGES
from lora_dist.errors import UserError
from lora_dist.metrics.predictions import (
    Predictions,
    folder_label,
    no_label,
    predictions_of,
    read_predictions,
)
from lora_dist.metrics.report import comparison_lines, evaluation_lines, paired
from lora_dist.settings.predict import Images

_UNREADABLE = -1


class Reference(NamedTuple):
    """Labels of --labels_file and predictions of --compare_to; None where the setting is missing."""

    labels: Listed | None
    predictions: Predictions | None


def read_reference(settings: Images) -> Reference:
    """Reads the files of --labels_file and --compare_to.

    Raises:
        UserError: one of them cannot be read.
    """
    return Reference(
        read_labels_file(demo.local_path(settings.images[0]), settings.labels_file) if settings.labels_file else None,
        read_predictions(settings.compare_to) if settings.compare_to else None,
    )


class Evaluation:
    """Collects the predicted class of each image, and compares it with labels and with other predictions.

    Labels are those of --labels_file, or the names of the images' folders if all of these are classes, at least two.

    Attributes:
        disagreements: the first rows whose class differs from that of --compare_to, as many as a grid shows.
    """

    def __init__(self, settings: Images, reference: Reference, files: Sequence[str], classes: Collection[str]) -> None:
        """
        Args:
            settings: name the files of `reference`.
            reference: of `read_reference`.
            files: the images, in order.
            classes: of the model.

        Raises:
            UserError: a label of --labels_file is no class of the model.
        """
        self._settings = settings
        self._files = files
        self._label_of = _labels_of(settings.labels_file, reference.labels, files, classes)
        self._other = reference.predictions
        self._other_class = dict(zip(self._other.paths, self._other.predicted, strict=True)) if self._other else {}
        self._names: dict[str, int] = {}
        self._predicted: dict[str | None, array] = {}
        self.disagreements: list[Row] = []

    def seen(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yields the rows, which are those of all files in order, for one adapter after the other."""
        for row in rows:
            if self._label_of is not no_label or self._other:
                label = row.top_k[0][0] if row.error is None else None
                number = _UNREADABLE if label is None else self._names.setdefault(label, len(self._names))
                self._predicted.setdefault(row.adapter, array("i")).append(number)
                differs = label is not None and label != self._other_class.get(row.path, label)
                if differs and len(self.disagreements) < GRID_IMAGES:
                    self.disagreements.append(row)
            yield row

    def lines(self) -> Iterator[str]:
        """Yields the results as text, for each adapter."""
        for adapter in self._predicted:
            found = self._predictions(adapter)
            if not len(found):
                continue
            if adapter is not None:
                yield f"adapter {adapter}:"
            labelled = found.select([row for row, label in enumerate(found.given) if label is not None])
            if len(labelled):
                yield from evaluation_lines(labelled)
            if len(labelled) < len(found) and self._settings.labels_file:
                yield f"{len(found) - len(labelled):,} images have no label in {self._settings.labels_file}"
            if self._other:
                yield ""
                names = ("this model", self._settings.compare_to or "")
                yield from comparison_lines(paired(found, self._other), names, self._label_of)

    def _predictions(self, adapter: str | None) -> Predictions:
        names = list(self._names)
        return predictions_of(
            {"path": path, "label": names[number], "given_label": self._label_of(path)}
            for path, number in zip(self._files, self._predicted[adapter], strict=True)
            if number != _UNREADABLE
        )

    def caption(self, row: Row) -> str:
        """Returns the predicted class of an image, and that of --compare_to."""
        label, score = row.top_k[0]
        return f"{label} {score:.0%}\nother: {self._other_class[row.path]}"


def _labels_of(
    name: str | None, listed: Listed | None, files: Sequence[str], classes: Collection[str]
) -> Callable[[str], str | None]:
    """Returns a function that finds the label of an image by its path; `name` is that of the file of labels."""
    if listed is None:
        return folder_label(files, classes)
    if unknown := sorted(set(listed.classes) - set(classes)):
        raise UserError(f"--labels_file {name}: labels that are no classes of the model: {', '.join(unknown)}")
    return {path: listed.classes[label] for path, label in zip(listed.paths, listed.labels, strict=True)}.get
