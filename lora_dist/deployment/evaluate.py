"""Evaluates what is deployed: predictions against the labels of the images, and against another file of predictions."""

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from lora_dist import demo
from lora_dist.data.pixels.conversion import Conversion
from lora_dist.data.pixels.images import load_rgb
from lora_dist.data.sources.labels_file import read_labels_file
from lora_dist.deployment.classify import Row
from lora_dist.deployment.outputs import GRID_IMAGES
from lora_dist.errors import UserError
from lora_dist.figures import grid
from lora_dist.metrics.predictions import (
    Predictions,
    folder_label,
    no_label,
    predictions_of,
    read_predictions,
)
from lora_dist.metrics.report import comparison_lines, evaluation_lines, paired
from lora_dist.settings.predict import Images
from lora_dist.storage.writable import writing

_UNREADABLE = -1


class Evaluation:
    """Collects the predicted class of each image, and compares it with labels and with other predictions.

    Labels are those of --labels_file, or the names of the images' folders if all of these are classes, at least two.
    """

    def __init__(self, settings: Images, files: Sequence[str], classes: Collection[str]) -> None:
        """Reads the labels and the other predictions.

        Raises:
            UserError: they cannot be read, or a label is no class of the model.
        """
        self._settings = settings
        self._files = files
        self._label_of = _labels_of(settings, files, classes)
        self._other = read_predictions(settings.compare_to) if settings.compare_to else None
        self._said_before = dict(zip(self._other.paths, self._other.predicted, strict=True)) if self._other else {}
        self._names: dict[str, int] = {}
        self._predicted: dict[str | None, array] = {}
        self._shown: list[Row] = []

    def seen(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yields the rows, which are those of all files in order, for one adapter after the other."""
        for row in rows:
            if self._label_of is not no_label or self._other:
                label = row.top_k[0][0] if row.error is None else None
                number = _UNREADABLE if label is None else self._names.setdefault(label, len(self._names))
                self._predicted.setdefault(row.adapter, array("i")).append(number)
                if label is not None and label != self._said_before.get(row.path, label):
                    self._shown = [*self._shown, row][:GRID_IMAGES]
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

    def draw_disagreements(self, path: Path, conversion: Conversion) -> bool:
        """Draws images for which the predictions differ, with both classes; returns False if there are none."""
        if not self._shown:
            return False
        captions = [
            f"{label} {score:.0%}\nother: {self._said_before[row.path]}"
            for row in self._shown
            for label, score in row.top_k[:1]
        ]
        with writing(path, "grid"):
            path.parent.mkdir(parents=True, exist_ok=True)
            grid([load_rgb(row.path, conversion=conversion) for row in self._shown], captions).save(path, "PNG")
        return True


def _labels_of(settings: Images, files: Sequence[str], classes: Collection[str]) -> Callable[[str], str | None]:
    """Returns what finds the label of an image by its path."""
    if settings.labels_file:
        listed = read_labels_file(demo.local_path(settings.images[0]), settings.labels_file)
        unknown = sorted(set(listed.classes) - set(classes))
        if unknown:
            raise UserError(
                f"--labels_file {settings.labels_file}: labels that are no classes of the model: {', '.join(unknown)}"
            )
        return {path: listed.classes[label] for path, label in zip(listed.paths, listed.labels, strict=True)}.get
    return folder_label(files, classes)
