"""Chooses the adapters that are most accurate together: a greedy soup (https://arxiv.org/abs/2203.05482)."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lora_dist.data.sources.exclusions import absolute
from lora_dist.deployment.classify import Inference, classify
from lora_dist.errors import UserError
from lora_dist.metrics.predictions import class_folder
from lora_dist.model.trained.classifier import Classifier
from lora_dist.model.trained.decision import MULTI_LABEL

logger = logging.getLogger(__name__)

Blend = Callable[[Mapping[str, Path], Sequence[float]], Classifier]


def greedy(directories: Mapping[str, Path], blend: Blend, accuracy: Callable[[Classifier], float]) -> list[str]:
    """Returns the names of the chosen adapters, the most accurate first.

    Each adapter, in the order of accuracy, stays in the soup if the average is at least as accurate with it.

    Args:
        directories: of the adapters by name.
        blend: loads the weighted sum of adapters as one classifier.
        accuracy: of a classifier on validation images.

    Raises:
        UserError: as `blend` and `accuracy`.
    """

    def measure(names: Sequence[str]) -> float:
        return accuracy(blend({name: directories[name] for name in names}, [1 / len(names)] * len(names)))

    alone = {name: measure([name]) for name in directories}
    order = sorted(alone, key=lambda name: -alone[name])
    soup, best = order[:1], alone[order[0]]
    for name in order[1:]:
        together = measure([*soup, name])
        if together >= best:
            soup, best = [*soup, name], together
    logger.info("accuracy alone: %s", ", ".join(f"{name} {alone[name]:.2%}" for name in order))
    logger.info("greedy soup of %s: %.2f%%", ", ".join(soup), 100 * best)
    if left_out := [name for name in order if name not in soup]:
        logger.info("left out: %s", ", ".join(left_out))
    return soup


def accuracy(classifier: Classifier, root: str, files: Sequence[str], inference: Inference) -> float:
    """Returns the share of the readable images in folders below `root` named after classes that are classified as such.

    Raises:
        UserError: there is no such image, or an image has several labels.
    """
    if classifier.decision.problem_type == MULTI_LABEL:
        raise UserError("--greedy_soup measures one class per image, and these adapters give several labels: --average")
    labels = frozenset(classifier.labels)
    folders = {file: folder for file in files if (folder := class_folder(file, labels, absolute(root)))}
    rows = classify(classifier, list(folders), inference, top_k=1)
    right = [row.top_k[0][0] == folders[row.path] for row in rows if row.error is None]
    if not right:
        raise UserError(
            f"--greedy_soup needs readable images in folders named after the classes ({classifier.labels[0]}, …)"
        )
    if len(right) < len(files):
        logger.warning("%d of %d images are unreadable or in no folder of a class", len(files) - len(right), len(files))
    return sum(right) / len(right)
