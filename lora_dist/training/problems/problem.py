"""`ProblemType`: the interface of a kind of labels to training. The settings choose one once.

`single_label_problem.py` implements it for one class per image, `multi_label_problem.py` for several labels, and
`problem_types.py` lists both by name. `data/sources/label_column.py` reads the labels, and `model/trained/decision.py`
turns logits into answers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from lora_dist.data.batch import Batch
from lora_dist.data.sources.load import ImageData
from lora_dist.data.sources.split import Split
from lora_dist.model.trained.decision import Decision
from lora_dist.settings.train import Settings
from lora_dist.training.problems.loss import SampleLoss


class ProblemType(Protocol):
    """Defines the loss, metrics, decision rule and pictures for one kind of labels.

    Attributes:
        headline: the metric that reports name first.
        is_calibrated: whether results have a temperature.
        keeps_scores: whether an evaluation has the score of every class, without being asked for probabilities.
        class_columns: titles of the columns of the model card's table of classes, by the name in `per_class` of an
            evaluation.
        labels_word: the word for classes in the model card.
    """

    headline: ClassVar[str]
    is_calibrated: ClassVar[bool]
    keeps_scores: ClassVar[bool]
    class_columns: ClassVar[Mapping[str, str]]
    labels_word: ClassVar[str]

    def loss(self, settings: Settings, data: ImageData) -> SampleLoss:
        """The loss of a run; raises `UserError` if the file of class weights cannot be read or lacks a class, or the
        metric for the best model is none of these classes."""

    def results(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the results of each sample: integers [B, I], of which the first is its index, and reals [B, R].

        NaN among the reals means that a logit is not finite.
        """

    def evaluation(self, split: Split, labels: Sequence[str], integers: np.ndarray, reals: np.ndarray) -> Any:
        """The `EvaluationResult` of the results of all samples that could be read, in order of their indices."""

    def decision(self, evaluation: Any) -> Decision:
        """Returns the decision that the result of a run with this evaluation makes by its logits."""

    def fixed(self, decision: Decision) -> "ProblemType":
        """Returns the problem type that measures a decision which was chosen on other data."""

    def caption(self, label: Any, labels: Sequence[str]) -> str:
        """The label of a sample in words."""

    def answers(self, evaluation: Any, split: Split, indices: Sequence[int], labels: Sequence[str]) -> list[str]:
        """Returns two lines for each of these samples: its label, and the model's answer."""

    def pictures(self, evaluation: Any, labels: Sequence[str]) -> dict[str, Image.Image]:
        """Pictures of an evaluation as a whole, by name."""

    def details(self, evaluation: Any, labels: Sequence[str]) -> dict[str, Any]:
        """Returns the entries of evaluation.json besides metrics, as JSON values."""

    def write_predictions(self, file: Path, evaluation: Any, split: Split, labels: Sequence[str]) -> None:
        """Writes a line of JSON for each sample that could be read: its label, and the model's answer."""

    def chance_level(self, evaluation: Any) -> tuple[float, str]:
        """Returns the `headline` of a model that has learned nothing, or NaN, and the words for this value."""


def worst_samples(losses: np.ndarray, count: int) -> list[int]:
    """Samples with the highest losses, worst first; none whose loss is NaN."""
    order = np.argsort(-losses, kind="stable")
    return order[: min(count, int(np.isfinite(losses).sum()))].tolist()


def by_sample(split: Split, rows: np.ndarray, values: np.ndarray, missing: float) -> np.ndarray:
    """Returns an array with one value, or row of values, per sample of the split; `missing` for those not in `rows`."""
    whole = np.full((len(split), *values.shape[1:]), missing, dtype=values.dtype)
    whole[rows] = values
    return whole
