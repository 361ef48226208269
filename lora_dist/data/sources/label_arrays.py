"""Arrays of labels: [N] class indices of one class per image, or [N, labels] of 0 and 1 for several labels.

Code that uses the labels of a split tells the two apart by their shape.
"""

import numpy as np


def class_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the number of samples of each class or label, int64; of at least `num_classes` for an array [N]."""
    if labels.ndim == 2:
        return labels.sum(axis=0, dtype=np.int64)
    return np.bincount(labels, minlength=num_classes)


def classes_in(labels: np.ndarray) -> set[int]:
    """The classes that have a sample."""
    return set(np.flatnonzero(class_counts(labels, 0)).tolist())


def with_unlabelled(labels: np.ndarray) -> np.ndarray:
    """Several labels [N, labels], with a last column for the samples that have none; other labels as they are."""
    return np.column_stack([labels, labels.sum(axis=1) == 0]) if labels.ndim == 2 else labels
