"""Turns logits into scores, and scores into an answer: the most likely class, or the labels above their thresholds."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_dist.errors import UserError
from lora_dist.metrics.multi_label import NEUTRAL
from lora_dist.settings.fields import MULTI_LABEL, SINGLE_LABEL

logger = logging.getLogger(__name__)


class Decision(Protocol):
    """Turns the logits of a model into scores and answers."""

    @property
    def problem_type(self) -> str:
        """The problem type of `transformers`, as `config.json` records it."""

    def scores(self, logits: Tensor) -> Tensor:
        """The score of each class, shape [B, classes], of finite logits in fp32."""

    def chosen(self, scores: Tensor) -> list[list[int]] | None:
        """The labels of each row, the highest score first; None if an image has one class: the most likely."""

    def record(self, labels: Sequence[str]) -> dict[str, float] | None:
        """The content of `thresholds.json` in a bundle, as JSON values; None for no such file."""


@dataclass(frozen=True)
class MostLikely:
    """One class per image: softmax, and the class of the highest score."""

    problem_type: str = SINGLE_LABEL

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)

    def chosen(self, scores: Tensor) -> None:
        return None

    def record(self, labels: Sequence[str]) -> None:
        return None


@dataclass(frozen=True)
class AboveThresholds:
    """Several labels per image: the sigmoid, and the labels whose scores reach their thresholds, highest score first.

    Attributes:
        thresholds: one per class, in class order.
    """

    thresholds: tuple[float, ...]
    problem_type: str = MULTI_LABEL

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def chosen(self, scores: Tensor) -> list[list[int]]:
        reached = scores >= torch.tensor(self.thresholds, dtype=scores.dtype, device=scores.device)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        rows = zip(order.tolist(), reached.tolist(), strict=True)
        return [[label for label in ranked if is_reached[label]] for ranked, is_reached in rows]

    def record(self, labels: Sequence[str]) -> dict[str, float]:
        return dict(zip(labels, self.thresholds, strict=True))


def decision_of(problem_type: str | None, record: Mapping[str, Any] | None, labels: Sequence[str]) -> Decision:
    """Returns the decision of a problem type and of the output of `Decision.record`; thresholds are 0.5 without a
    record.

    Any other problem type, or none, means one class per image.

    Raises:
        UserError: the record is not one of these labels.
    """
    if problem_type != MULTI_LABEL:
        return MostLikely()
    if record is None:
        return AboveThresholds((NEUTRAL,) * len(labels))
    if not isinstance(record, Mapping) or record.keys() != set(labels):
        raise UserError("the thresholds are those of other labels than the label map has")
    try:
        return AboveThresholds(tuple(float(record[label]) for label in labels))
    except (TypeError, ValueError) as error:
        raise UserError(f"a threshold is not a number: {error}") from error


def mean_decision(decisions: Sequence[Decision], weights: Sequence[float]) -> Decision:
    """The decision of a weighted sum of adapters of one problem type; says that it has the weighted mean of their
    thresholds, because no data has been scored by the sum."""
    thresholds = [decision.thresholds for decision in decisions if isinstance(decision, AboveThresholds)]
    if len(thresholds) < 2:
        return decisions[0]
    logger.warning("the thresholds of the weighted sum are means of those of its adapters and may not suit it")
    mean = (sum(map(mul, weights, own)) for own in zip(*thresholds, strict=True))
    return AboveThresholds(tuple(mean))
