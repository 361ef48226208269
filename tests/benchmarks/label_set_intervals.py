"""Measures how often the 95% intervals of several labels hold the metrics of 100,000 images, with labels of few images.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/label_set_intervals.py

Prints the table in docs/labels.md. The scores are drawn: those of images with a label are higher by one deviation.
"""

import argparse
from collections import Counter

import numpy as np

from lora_dist.metrics.intervals import bootstrap
from lora_dist.metrics.multi_label import multi_label_metrics
from lora_dist.metrics.multi_label_intervals import label_set_measure, measure_label_sets

LABELS, THRESHOLD = 10, 1.0
SETS = ((40, 0.15), (150, 0.15), (600, 0.15))
"""Images, and share of the images that have a label."""
METRICS = ("mAP", "micro_f1", "macro_f1")


def draw(images: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the predicted labels, the true labels and the scores, each [images, labels]."""
    random = np.random.default_rng(seed)
    positive = random.random((images, LABELS)) < share
    scores = random.normal(size=positive.shape) + positive
    return scores >= THRESHOLD, positive, scores


def held(images: int, share: float, draws: int) -> Counter[tuple[str, bool]]:
    """Returns the number of intervals that hold the truth, by metric and by whether they are plain percentiles."""
    _, positive, scores = draw(100_000, share, 0)
    truth, _ = multi_label_metrics(scores, positive, np.full(LABELS, THRESHOLD))
    found: Counter[tuple[str, bool]] = Counter()
    for seed in range(1, draws + 1):
        drawn = draw(images, share, seed)
        plain = bootstrap(label_set_measure(*drawn), images)
        for is_plain, intervals in ((True, plain), (False, measure_label_sets(*drawn).intervals)):
            for name, (low, high) in intervals.items():
                found[name, is_plain] += low <= truth[name] <= high
    return found


def main(draws: int) -> None:
    """Prints a row of each number of images and share."""
    for images, share in SETS:
        found = held(images, share, draws)
        cells = (f"{found[name, is_plain] / draws:.0%}" for is_plain in (True, False) for name in METRICS)
        print(f"| {images} | {images * share:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=200)
    main(parser.parse_args().draws)
