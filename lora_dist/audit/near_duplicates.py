"""Finds near duplicates (resized, compressed or brightened copies): hashes propose pairs, pixels confirm them.

Multi-index hashing (Norouzi et al. 2014, arXiv:1307.2982) looks pairs up by parts of their hashes: if two hashes differ
in at most 7 bits, one of their four 16-bit parts differs in at most one bit. 100,000 images need some millions of
comparisons instead of five billion. If very many images are alike, e.g. frames of a film, each lookup compares at most
`MAX_MATCHES` of them, to keep the time linear in the number of images.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

NEAR_BITS = 7
PART_BITS = 16
MAX_MATCHES = 64
SHIFT = 24.0
"""Largest difference in mean brightness between copies, in levels of 256."""
LOW_CONTRAST = 8.0
"""Smallest contrast by which differences are divided, in levels of 256. A lower contrast is noise."""
_BATCH = 512
_CHUNK = 2**20
_ONES = np.array([number.bit_count() for number in range(2**16)], dtype=np.uint8)


def near_pairs(phashes: Sequence[int], colors: Sequence[bytes], distance: float) -> Iterator[tuple[int, int]]:
    """Yields sorted pairs of indices of near duplicates, the lower index first.

    Args:
        phashes: Perceptual hashes of 64 bits.
        colors: The images as small RGB images of equal size.
        distance: Largest root mean square difference after removing mean brightness, relative to the higher contrast of
            the two images.
    """
    if len(phashes) < 2:
        return
    hashes = np.array(phashes, dtype=np.uint64)
    pictures = np.frombuffer(b"".join(colors), dtype=np.uint8)
    # [N, 3, P]
    pictures = np.ascontiguousarray(pictures.reshape(len(hashes), -1, 3).swapaxes(1, 2))
    batches = (pictures[start : start + _BATCH] for start in range(0, len(pictures), _BATCH))
    contrasts = np.concatenate([np.zeros(0), *(_means_and_spread(batch)[1] for batch in batches)])
    found = [np.array([], dtype=np.int64)]
    for first, second in _lookups(hashes):
        near = _ONES[(hashes[first] ^ hashes[second]).view(np.uint16).reshape(-1, 4)].sum(axis=1) <= NEAR_BITS
        first, second = first[near], second[near]
        # Pairs as single numbers, to remove those that several parts find.
        found.append(np.unique(np.minimum(first, second) * len(hashes) + np.maximum(first, second)))
    candidates = np.unique(np.concatenate(found))
    for start in range(0, len(candidates), _BATCH):
        first, second = np.divmod(candidates[start : start + _BATCH], len(hashes))
        shifts, differences = _means_and_spread(pictures[first].astype(np.float32) - pictures[second])
        contrast = np.maximum(contrasts[first], contrasts[second]).clip(LOW_CONTRAST)
        alike = (differences <= distance * contrast) & (np.abs(shifts).max(axis=1) <= SHIFT)
        yield from zip(first[alike].tolist(), second[alike].tolist(), strict=True)


def _lookups(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields indices of pairs whose hashes differ in at most one bit of one part."""
    for part in range(64 // PART_BITS):
        keys = ((hashes >> np.uint64(PART_BITS * part)) & np.uint64(2**PART_BITS - 1)).astype(np.int64)
        # Sorted by hash within a bucket, so that neighbors are similar.
        order = np.lexsort((hashes, keys))
        in_order = keys[order]
        for flip in [0, *(1 << bit for bit in range(PART_BITS))]:
            wanted = in_order ^ flip
            starts, ends = np.searchsorted(in_order, wanted, "left"), np.searchsorted(in_order, wanted, "right")
            if flip == 0:
                starts = np.arange(1, len(order) + 1)
            # Visits each pair of buckets once.
            counts = np.where(in_order <= wanted, np.clip(ends - starts, 0, MAX_MATCHES), 0)
            for chunk in _chunks(counts):
                within = np.arange(counts[chunk].sum()) - np.repeat(
                    np.cumsum(counts[chunk]) - counts[chunk], counts[chunk]
                )
                yield np.repeat(order[chunk], counts[chunk]), order[np.repeat(starts[chunk], counts[chunk]) + within]


def _chunks(counts: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the indices where `counts` is not 0, in pieces whose counts add up to about `_CHUNK`."""
    chunk = np.flatnonzero(counts)
    if len(chunk):
        yield from np.split(chunk, np.flatnonzero(np.diff(np.cumsum(counts[chunk]) // _CHUNK)) + 1)


def _means_and_spread(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each channel [N, 3], and root mean square deviation from the means [N]."""
    pixels = pictures.astype(np.float32, copy=False)
    means = pixels.mean(axis=2)
    squares = np.einsum("ncp,ncp->n", pixels, pixels) / pixels[0].size
    return means, np.sqrt(np.maximum(squares - (means**2).mean(axis=1), 0))


def connected(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Connected components of pairs; each is sorted, and they are ordered by their first index."""
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
