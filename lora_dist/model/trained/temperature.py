"""The temperature of a classifier, and its folding into the head."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_dist.model.base.head import class_dimensions


class Calibration(NamedTuple):
    """The temperature of a classifier (https://arxiv.org/abs/1706.04599).

    Attributes:
        temperature: the logits are divided by it before the softmax.
        folded: the weights of the head have been divided by it already.
    """

    temperature: float = 1.0
    folded: float = 1.0

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Calibration":
        """Reads what `record` returned; missing fields have their defaults. Raises any exception for anything else."""
        made = cls(*(float(record.get(name, 1.0)) for name in cls._fields))
        for name, value in zip(cls._fields, made, strict=True):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} {value} is not a positive number")
        return made

    def record(self) -> dict[str, float]:
        """The calibration as JSON values."""
        return self._asdict()


UNCALIBRATED = Calibration()
"""The calibration of bundles without a record, and of models of other programs."""


@torch.no_grad()
def fold(model: Any, calibration: Calibration) -> Calibration:
    """Divides the weights of the last layer by the temperature, in place, so that any program computes its logits.

    Args:
        model: a `transformers` classifier without an adapter.
        calibration: of the model so far.

    Returns:
        The calibration afterwards: as before if the logits are not the output of a linear layer or a convolution.
    """
    if calibration.temperature == 1:
        return calibration
    names = class_dimensions(model.config, type(model))
    layers = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    if not layers or not all(isinstance(layer, nn.Linear | nn.Conv2d) for layer in layers):
        return calibration
    for name in names:
        model.get_parameter(name).div_(calibration.temperature)
    return Calibration(folded=calibration.folded * calibration.temperature)
