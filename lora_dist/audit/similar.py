"""Which images are the same picture, resized, compressed or brightened: hashes find pairs, pixels confirm them.

Pairs are looked up by parts of their hashes (multi-index hashing, Norouzi et al. 2014, arXiv:1307.2982): of two hashes
that differ in 7 bits or fewer, one of four 16-bit parts differs in at most one. So 100,000 images take some millions of
comparisons and not five billion. Where very many look alike, such as frames of a film, a look-up gives up after
`WINDOW` of them, and time still grows with the number of images and not with its square.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

NEAR_BITS = 7
PART_BITS = 16
WINDOW = 64
SHIFT = 24.0
"""How much brighter a copy may be on the whole, in levels of 256."""
LOW_CONTRAST = 8.0
"""Contrast, in levels of 256, below which an image is as good as plain: a picture of noise is not compared by it."""
_AT_ONCE = 512
_ONES = np.array([number.bit_count() for number in range(2**16)], dtype=np.uint8)


def near_pairs(looks: Sequence[int], colors: Sequence[bytes], distance: float) -> Iterator[tuple[int, int]]:
    """Yields pairs of places of images that look the same, the lower first, in order.

    Args:
        looks: perceptual hashes, each of 64 bits.
        colors: the images as small RGB pictures of one size.
        distance: largest root mean square difference of two pictures, apart from brightness, relative to the contrast
            of the stronger one.
    """
    if len(looks) < 2:
        return
    hashes = np.array(looks, dtype=np.uint64)
    pictures = np.frombuffer(b"".join(colors), dtype=np.uint8)
    # By channel, with the pixels of one next to each other: [N, 3, P].
    pictures = np.ascontiguousarray(pictures.reshape(len(hashes), -1, 3).swapaxes(1, 2))
    parts = (pictures[start : start + _AT_ONCE] for start in range(0, len(pictures), _AT_ONCE))
    contrasts = np.concatenate([np.zeros(0), *(_means_and_spread(part)[1] for part in parts)])
    found = [np.array([], dtype=np.int64)]
    for first, second in _lookups(hashes):
        near = _ONES[(hashes[first] ^ hashes[second]).view(np.uint16).reshape(-1, 4)].sum(axis=1) <= NEAR_BITS
        first, second = first[near], second[near]
        # A pair as one number, for the same pair is found by several parts.
        found.append(np.unique(np.minimum(first, second) * len(hashes) + np.maximum(first, second)))
    candidates = np.unique(np.concatenate(found))
    for start in range(0, len(candidates), _AT_ONCE):
        first, second = np.divmod(candidates[start : start + _AT_ONCE], len(hashes))
        shifts, differences = _means_and_spread(pictures[first].astype(np.float32) - pictures[second])
        contrast = np.maximum(contrasts[first], contrasts[second]).clip(LOW_CONTRAST)
        alike = (differences <= distance * contrast) & (np.abs(shifts).max(axis=1) <= SHIFT)
        yield from zip(first[alike].tolist(), second[alike].tolist(), strict=True)


def _lookups(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of places whose hashes differ in at most one bit of one part."""
    for part in range(64 // PART_BITS):
        keys = ((hashes >> np.uint64(PART_BITS * part)) & np.uint64(2**PART_BITS - 1)).astype(np.int64)
        # Within a bucket in the order of the hashes, so that those next to each other are the most alike.
        order = np.lexsort((hashes, keys))
        in_order = keys[order]
        for flip in [0, *(1 << bit for bit in range(PART_BITS))]:
            wanted = in_order ^ flip
            starts, ends = np.searchsorted(in_order, wanted, "left"), np.searchsorted(in_order, wanted, "right")
            if flip == 0:
                starts = np.arange(1, len(order) + 1)
            # Each pair of buckets once.
            counts = np.where(in_order <= wanted, np.clip(ends - starts, 0, WINDOW), 0)
            for rows in _in_parts(counts):
                within = np.arange(counts[rows].sum()) - np.repeat(np.cumsum(counts[rows]) - counts[rows], counts[rows])
                yield np.repeat(order[rows], counts[rows]), order[np.repeat(starts[rows], counts[rows]) + within]


def _in_parts(counts: np.ndarray, most: int = 2**20) -> Iterator[np.ndarray]:
    """Places of counts that are not 0, in parts that add up to about `most`."""
    rows = np.flatnonzero(counts)
    if len(rows):
        yield from np.split(rows, np.flatnonzero(np.diff(np.cumsum(counts[rows]) // most)) + 1)


def _means_and_spread(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each channel [N, 3], and root mean square deviation from them [N]."""
    pixels = pictures.astype(np.float32, copy=False)
    means = pixels.mean(axis=2)
    squares = np.einsum("ncp,ncp->n", pixels, pixels) / pixels[0].size
    return means, np.sqrt(np.maximum(squares - (means**2).mean(axis=1), 0))


def connected(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Groups of places that are connected by pairs, each sorted, in the order of their first."""
    parents: dict[int, int] = {}

    def root(index: int) -> int:
        parents.setdefault(index, index)
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for first, second in pairs:
        low, high = sorted((root(first), root(second)))
        parents[high] = low
    groups: dict[int, list[int]] = {}
    for index in sorted(parents):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())
