"""Class weights: from the sizes of the classes or a file, and their sum over the samples of an update."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from lora_dist.data.batch import TrainImages
from lora_dist.data.sampling.order import BatchPlan
from lora_dist.data.sources.load import ImageData
from lora_dist.data.sources.split import Split
from lora_dist.errors import UserError
from lora_dist.settings.train import Settings
from lora_dist.settings.yaml_text import parse_yaml
from lora_dist.training.problems.loss import Loss, SampleLoss

_SHOWN = 5


def make_loss(settings: Settings, data: ImageData) -> Loss:
    """Returns the loss of a run; raises `UserError` if the file of class weights cannot be read or lacks a class."""
    chosen = settings.optimization.class_weights
    weights = None
    if chosen == "balanced":
        assert isinstance(data.train, Split)
        weights = balanced_weights(data.train.labels, len(data.labels))
    elif chosen != "none":
        weights = read_weights(chosen, data.labels)
    return Loss(settings.augmentation.label_smoothing_factor, weights, settings.optimization.focal_gamma)


def balanced_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """Samples / (classes with samples * samples of the class), as in scikit-learn, float32 [num_classes].

    The mean over all samples is 1. Classes without samples get 1.
    """
    counts = np.bincount(labels, minlength=num_classes)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts > 0, weights, 1.0)).float()


def read_weights(file: str, labels: Sequence[str]) -> Tensor:
    """Reads a YAML or JSON file that maps each class name to a positive weight, float32 [classes]."""
    where = f"--class_weights {file}"
    try:
        # BaseLoader keeps class names such as `no` and `1` as text.
        content = parse_yaml(Path(file).read_text(encoding="utf-8"), yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; the values are none, balanced, or a file") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: not a YAML or JSON file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected one line for each class, such as rose: 2.5")
    missing, unknown = [name for name in labels if name not in content], sorted(content.keys() - set(labels))
    for what, names in (("no weight for", missing), ("unknown classes", unknown)):
        if names:
            raise UserError(f"{where}: {what} {', '.join(names[:_SHOWN])}{' …' if len(names) > _SHOWN else ''}")
    weights = []
    for name in labels:
        try:
            weights.append(float(content[name]))
        except (TypeError, ValueError):
            weights.append(math.nan)
        if not 0 < weights[-1] < math.inf:
            raise UserError(f"{where}: the weight of {name} is {content[name]}, not a positive number")
    return torch.tensor(weights)


def describe_weights(setting: str) -> str:
    """The setting for the identity of a run: a file by its content."""
    if setting in ("none", "balanced"):
        return setting
    return f"file {hashlib.sha256(Path(setting).read_bytes()).hexdigest()[:16]}"


def planned_weight(loss: SampleLoss, images: TrainImages, plan: BatchPlan, step: int) -> float:
    """The sum of the weights of the samples of this process in update `step`, as if all images could be read."""
    samples = [sample for micro_batch in plan.micro_batches(step) for sample in micro_batch if sample.weight]
    labels = images.split.labels  # type: ignore[attr-defined]  # streams have no class weights
    own, partners = (
        torch.from_numpy(labels[[getattr(sample, name) % len(labels) for sample in samples]])
        for name in ("index", "partner")
    )
    if not any(images.mixing):
        return float(loss.weights_of(own).double().sum())
    shares = torch.tensor([images.mixture(sample.epoch, sample).lam for sample in samples])
    return float(loss.weights_of(own, partners, shares).double().sum())
