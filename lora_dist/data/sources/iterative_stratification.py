"""Splits samples with several labels so that each part has its share of every label.

Iterative stratification: Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data", ECML 2011.
"""

from collections.abc import Sequence

import numpy as np

from lora_dist.data.sources.label_arrays import with_unlabelled


def iterative_stratification(labels: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """Returns the part of each sample, int64 [N]. Rare labels are distributed first.

    Samples without a label count as samples of one more label. A label with as many samples as there are parts has one
    in each part where the other labels allow that.

    Args:
        labels: of the samples, 0 or 1 [N, labels].
        shares: of the samples in each part; they sum to 1.
        seed: decides between parts that need a sample equally, and the order of the samples.
    """
    random = np.random.default_rng([seed, *labels.shape])
    columns = with_unlabelled(labels).astype(bool)
    order = random.permutation(len(columns))
    counts = columns.sum(axis=0)
    wanted = np.outer(shares, counts)
    wanted = np.where(counts >= len(shares), np.maximum(wanted, 1), wanted)
    wanted_samples = np.array(shares) * len(columns)
    parts = np.full(len(columns), -1)
    left = counts.copy()
    while left.any():
        label = int(np.where(left > 0, left, len(columns) + 1).argmin())
        for sample in order[columns[order, label] & (parts[order] < 0)]:
            most = np.flatnonzero(wanted[:, label] == wanted[:, label].max())
            most = most[wanted_samples[most] == wanted_samples[most].max()]
            part = int(most[0] if len(most) == 1 else random.choice(most))
            parts[sample] = part
            wanted[part, columns[sample]] -= 1
            wanted_samples[part] -= 1
            left -= columns[sample]
    _repair(columns, parts, len(shares))
    return parts


def _repair(columns: np.ndarray, parts: np.ndarray, num_parts: int) -> None:
    """Moves a sample of each label to each part without one, unless another part loses its last sample of a label."""
    present = np.stack([columns[parts == part].sum(axis=0) for part in range(num_parts)])
    total = columns.sum(axis=0)
    for label in np.argsort(total, kind="stable"):
        for part in np.flatnonzero(present[:, label] == 0):
            for sample in np.flatnonzero(columns[:, label]):
                source, own = parts[sample], columns[sample]
                if (present[source, own] > 1).all():
                    parts[sample] = part
                    present[source, own] -= 1
                    present[part, own] += 1
                    break


def stratified_halves(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Holds out about `fraction` of the samples with each label; indices to keep and held out, both ascending."""
    parts = iterative_stratification(labels, (1 - fraction, fraction), seed)
    return np.flatnonzero(parts == 0), np.flatnonzero(parts == 1)


def stratified_selection(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Selects `count` indices, ascending, with about their share of each label."""
    others, chosen = stratified_halves(labels, count / len(labels), seed)
    random = np.random.default_rng([seed, count])
    kept = random.permutation(chosen)[:count]
    return np.sort(np.concatenate([kept, random.permutation(others)[: count - len(kept)]]))
