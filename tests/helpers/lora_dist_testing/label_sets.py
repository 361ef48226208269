"""Images with several labels: a stripe for each label, and a file of the labels."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

LABELS = ("bird", "cat", "dog")
HEADER = ("path", "label", "split", "site")


def make_label_sets(root: Path) -> dict[str, object]:
    """Writes `photos/` and `labels.csv` below `root`, and returns the settings that train on them alone.

    `unsplit.csv` is `labels.csv` without the column of splits.

    Every fifth image has no label, and every seventh all of them.
    """
    random = np.random.default_rng(0)
    (root / "photos").mkdir(parents=True)
    rows = []
    splits = ["train"] * 27 + ["validation"] * 12 + ["test"] * 6
    for number, split in enumerate(splits):
        pixels = random.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        shown = random.random(len(LABELS)) < 0.4
        if number % 7 == 6:
            shown[:] = True
        elif number % 5 == 4:
            shown[:] = False
        for place in np.flatnonzero(shown):
            pixels[:, 10 * place : 10 * place + 10, place] = 220
        Image.fromarray(pixels).save(root / "photos" / f"{number:03d}.png")
        labels = ";".join(LABELS[place] for place in np.flatnonzero(shown))
        rows.append((f"{number:03d}.png", labels, split, ("north", "south")[number % 2]))
    with (root / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *rows])
    with (root / "unsplit.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows((path, labels, site) for path, labels, _, site in [HEADER, *rows])
    return {
        "train_dir": root / "photos",
        "validation_dir": None,
        "labels_file": root / "labels.csv",
        "problem_type": "multi_label_classification",
    }
