"""Accuracies before training (`--probe`): of a linear probe and of nearest neighbours on the features of the base."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from lora_dist.data.feature_batches import Features
from lora_dist.data.sources.split import Split
from lora_dist.model.lora.adapters import base_of
from lora_dist.storage.atomic import replace_file
from lora_dist.training.frozen_backbone import collect
from lora_dist.training.run import TrainingRun

logger = logging.getLogger(__name__)

NEIGHBOURS = 20
TEMPERATURE = 0.07
"""Both as in DINO (https://arxiv.org/abs/2104.14294)."""
ITERATIONS = 200
ROWS = 1024
"""Images whose distances to all training images are in memory at once."""


def probe(run: TrainingRun, heads: list[str], train: Split, path: Path) -> None:
    """Measures both accuracies and writes them to a file, unless a resumed run has changed the features already.

    Must be called on every process, in the watch's context.

    Args:
        run: before its first update.
        heads: modules that are trained in full.
        train: training images; seen as in an evaluation.
        path: file for the accuracies.
    """
    step = run.progress.step
    if step or len(heads) != 1:
        if not path.exists():
            reason = "the run has trained already" if step else f"several modules train in full: {', '.join(heads)}"
            logger.warning("--probe: no linear probe, because %s", reason)
        return
    start = time.perf_counter()
    run.watch.enter("computing the features of the base", extra_time=True)
    accelerator, validation = run.engine.accelerator, run.evaluator.split
    head = base_of(run.engine.unwrapped).get_submodule(heads[0])
    train_features, queries = (
        collect(run, run.engine.model, head, split, replace(run.evaluator, split=split).loader)
        for split in (train, validation)
    )
    run.watch.enter("fitting the linear probe", extra_time=True)
    found: list[dict[str, float]] = [{}]
    if accelerator.is_main_process:
        found = [accuracies(train_features, queries, len(run.evaluator.labels), accelerator.device)]
        replace_file(path, (json.dumps(found[0], indent=2) + "\n").encode())
    found = broadcast_object_list(found)
    run.tracker.say(f"before training: {in_words(found[0])}, in {time.perf_counter() - start:.0f} s")


def accuracies(train: Features, queries: Features, classes: int, device: torch.device) -> dict[str, float]:
    """Returns `probe_accuracy` and `knn_accuracy` of `classes` classes on the readable images of `queries`."""
    x, y, x_queries, y_queries = (
        tensor.to(device)
        for features in (train, queries)
        for tensor in (features.values[features.readable].flatten(1).float(), features.labels[features.readable])
    )
    predictions = {"probe": linear_probe(x, y, x_queries, classes), "knn": neighbours(x, y, x_queries, classes)}
    return {f"{name}_accuracy": float((found == y_queries).float().mean()) for name, found in predictions.items()}


def linear_probe(x: Tensor, y: Tensor, queries: Tensor, classes: int) -> Tensor:
    """Returns the classes that logistic regression predicts, with the L2 penalty of scikit-learn's C = 1.

    Args:
        x: features [N, F], standardised here.
        y: classes, int64 [N].
        queries: features [M, F].
        classes: their number.
    """
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0)
    deviation = deviation.where(deviation > 0, 1.0)
    x, queries = (x - mean) / deviation, (queries - mean) / deviation
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(x @ weight.T + bias, y) + weight.square().sum() / (2 * len(x))
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return (queries @ weight.detach().T + bias.detach()).argmax(dim=1)


def neighbours(x: Tensor, y: Tensor, queries: Tensor, classes: int) -> Tensor:
    """Returns the classes for which the nearest features vote, by cosine similarity; arguments as `linear_probe`."""
    x, targets = normalize(x), one_hot(y, classes).float()
    voted = []
    for rows in normalize(queries).split(ROWS):
        nearest = (rows @ x.T).topk(min(NEIGHBOURS, len(x)), dim=1)
        votes = (nearest.values / TEMPERATURE).exp()[..., None] * targets[nearest.indices]
        voted.append(votes.sum(dim=1).argmax(dim=1))
    return torch.cat(voted)


def read_probe(path: Path) -> dict[str, float]:
    """Returns the accuracies that `probe` wrote; empty if the file does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def in_words(found: Mapping[str, Any]) -> str:
    """The accuracies that `probe` found as part of a sentence."""
    return f"linear probe {found['probe_accuracy']:.4f}, kNN {found['knn_accuracy']:.4f}"
