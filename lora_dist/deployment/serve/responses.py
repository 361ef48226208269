"""The JSON of the endpoints: predictions, and the health of the server."""

from typing import Literal

from pydantic import BaseModel
from torch import Tensor

from lora_dist.deployment.classify import Row
from lora_dist.model.trained.classifier import Classifier


class Score(BaseModel):
    """A class and its probability."""

    label: str
    score: float


class Prediction(BaseModel):
    """The prediction for one file, with the fields of a JSON line of `predict`.

    The label is 'unknown' if the score is below the server's --min_confidence.
    """

    file: str
    label: str
    score: float
    top_k: list[Score]


class LabelSetPrediction(BaseModel):
    """The prediction of several labels for one file: labels above their thresholds, and the highest scores."""

    file: str
    labels: list[Score]
    top_k: list[Score]


class Predictions(BaseModel):
    """One prediction per file, in the order of the request."""

    predictions: list[Prediction] | list[LabelSetPrediction]


class Health(BaseModel):
    """The answer of a server that can classify: its state and the names of its adapters."""

    status: Literal["ok"]
    adapters: list[str]


def predictions_of(
    classifier: Classifier, files: list[str], probabilities: Tensor, top_k: int, min_confidence: float | None
) -> Predictions:
    """Returns the response for files with these probabilities [B, classes]."""
    best, above = classifier.top_k(probabilities, top_k), classifier.chosen(probabilities)
    rows = (Row(file, scored, labels=labels) for file, scored, labels in zip(files, best, above, strict=True))
    # All predictions of a classifier are of the same type.
    return Predictions(predictions=[_prediction(row.known_from(min_confidence)) for row in rows])  # type: ignore[arg-type]


def _prediction(row: Row) -> Prediction | LabelSetPrediction:
    top_k = _scored(row.top_k)
    if row.labels is not None:
        return LabelSetPrediction(file=row.path, labels=_scored(row.labels), top_k=top_k)
    return Prediction(file=row.path, label=row.label, score=top_k[0].score, top_k=top_k)


def _scored(classes: list[tuple[str, float]]) -> list[Score]:
    return [Score(label=label, score=score) for label, score in classes]
