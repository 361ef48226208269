"""Trains two digits side by side with several labels per image: LoRA against the linear probe, over three seeds.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/several_labels.py

Prints the rows of the table in docs/labels.md, and adds them to `results/several_labels.csv`.
"""

import argparse
import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from result_files import add_rows
from training_runs import train

from lora_dist.demo import local_path

METRICS = ("mAP", "micro_f1", "macro_f1")
SPLITS = {"train": 240, "validation": 80, "test": 160}
EMPTY = 0.2
"""Share of the images of which a half is empty."""


def write_pairs(root: Path, seed: int) -> None:
    """Writes `photos/` and `labels.csv`: validation and test images show digits that no training image shows."""
    random = np.random.default_rng(seed)
    files = {
        split: np.array(sorted(Path(local_path(f"demo:digits/{split}")).rglob("*.png")))
        for split in ("train", "validation")
    }
    (root / "photos").mkdir()
    rows = []
    for split, count in SPLITS.items():
        for number in range(count):
            pair = random.choice(files["train" if split == "train" else "validation"], 2)
            pixels = np.concatenate([np.asarray(Image.open(file)) for file in pair], axis=1)
            labels = [file.parent.name for file in pair]
            if random.random() < EMPTY:
                side = int(random.integers(2))
                pixels[:, 8 * side : 8 * side + 8] = 0
                del labels[side]
            # Black bars above and below make the image square.
            square = np.pad(pixels, ((4, 4), (0, 0)))
            name = f"{split}-{number:04d}.png"
            Image.fromarray(square).resize((64, 64), Image.Resampling.BICUBIC).save(root / "photos" / name)
            rows.append((name, ";".join(sorted(set(labels))), split))
    with (root / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])


def measure(root: Path, tuning: str, seed: int, epochs: int) -> dict[str, float]:
    """Trains on the pairs in `root`; returns the metrics on the test images."""
    results = train(
        root / f"{tuning}-{seed}",
        model_name_or_path="demo:vit",
        problem_type="multi_label_classification",
        train_dir=root / "photos",
        labels_file=root / "labels.csv",
        tuning=tuning,
        seed=seed,
        mixed_precision="no",
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        learning_rate=3e-3,
        eval_steps="no",
        checkpointing_steps="no",
        augmentation="none",
    )
    return {name: results[f"test_{name}"] for name in METRICS}


def main(tunings: Sequence[str], seeds: Sequence[int], epochs: int) -> None:
    """Measures ways of tuning with each seed, and prints a row of each."""
    rows: list[dict[str, object]] = []
    for tuning in tunings:
        found = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as directory:
                write_pairs(Path(directory), seed)
                found.append(measure(Path(directory), tuning, seed, epochs))
            rows.append({"tuning": tuning, "seed": seed, "epochs": epochs, **found[-1]})
        cells = (
            f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
            for values in ([one[name] for one in found] for name in METRICS)
        )
        print(f"| `--tuning {tuning}` | {' | '.join(cells)} |", flush=True)
    add_rows("several_labels.csv", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tunings", nargs="+", default=["head", "lora"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    main(arguments.tunings, arguments.seeds, arguments.epochs)
