"""Cuts samples into folds for cross-validation, as a function of labels, groups and seed alone."""

from collections.abc import Sequence

import numpy as np

from lora_dist.data.sources.iterative_stratification import iterative_stratification
from lora_dist.data.sources.label_arrays import with_unlabelled


def fold_numbers(labels: np.ndarray, groups: Sequence[str] | None, folds: int, seed: int) -> np.ndarray:
    """Returns the fold of each sample, from 0, shape [N]; each class or label is spread as evenly as possible.

    Args:
        labels: class of each sample, shape [N], or 0 and 1 for each of several labels, [N, labels].
        groups: group of each sample; all samples of a group are in one fold.
        folds: number of folds.
    """
    if groups is not None:
        return _by_group(labels, groups, folds, seed)
    if labels.ndim == 2:
        return iterative_stratification(labels, [1 / folds] * folds, seed)
    return _by_sample(labels, folds, seed)


def _by_sample(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Assigns the shuffled samples of one class after the other to the folds in turn."""
    order = [
        np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        for label in np.unique(labels)
    ]
    numbers = np.empty(len(labels), dtype=np.int64)
    numbers[np.concatenate(order)] = np.arange(len(labels)) % folds
    return numbers


def _by_group(labels: np.ndarray, groups: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """Puts one group after the other, the largest first, where the classes of all folds then differ least.

    Of several such folds, the one with the fewest samples gets the group. As scikit-learn's StratifiedGroupKFold, with
    rarer classes counting as much as frequent ones. Several labels are as many classes, to which an image counts;
    images without a label are those of one more.
    """
    names, members = np.unique(np.array(groups), return_inverse=True)
    labels = with_unlabelled(labels)
    if labels.ndim == 2:
        counts = np.zeros((len(names), labels.shape[1]))
        np.add.at(counts, members, labels)
    else:
        counts = np.zeros((len(names), int(labels.max()) + 1))
        np.add.at(counts, (members, labels), 1)
    share = counts / np.maximum(counts.sum(axis=0), 1)
    shuffled = np.random.default_rng([seed, len(names)]).permutation(len(names))
    sizes, held_samples = np.bincount(members), np.zeros(folds)
    held, fold_of = np.zeros((folds, counts.shape[1])), np.empty(len(names), dtype=np.int64)
    for group in shuffled[np.argsort(-share[shuffled].max(axis=1), kind="stable")]:
        # The sum of squares of a fold's shares grows least where the fold has least of the group's classes.
        costs = ((held + share[group]) ** 2 - held**2).sum(axis=1)
        cheapest = np.isclose(costs, costs.min(), rtol=0, atol=1e-12)
        fold = np.where(cheapest, held_samples, np.inf).argmin()
        fold_of[group] = fold
        held[fold] += share[group]
        held_samples[fold] += sizes[group]
    return fold_of[members]
