"""How many of the labels that are flipped on purpose the audit finds: precision and recall on the demo's digits.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/label_noise.py

Flips the labels of a share of scikit-learn's digits, trains the demo's model on each of five folds, gathers them, and
runs the audit, all by the commands that users run.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
from training_runs import train

from lora_dist.demo import local_path
from lora_dist.metrics.predictions import read_predictions

CLASSES = 10
SUREST = 40


def write_flipped(directory: Path, share: float, seed: int) -> set[str]:
    """Writes all digits as class folders, a share of them in that of another class; returns the paths of these."""
    images = sorted(Path(local_path("demo:digits/train")).parent.rglob("*.png"))
    random = np.random.default_rng(seed)
    chosen = set(random.choice(len(images), round(share * len(images)), replace=False).tolist())
    flipped = set()
    for index, image in enumerate(images):
        true = int(image.parent.name)
        given = (true + int(random.integers(1, CLASSES))) % CLASSES if index in chosen else true
        path = directory / str(given) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, path)
        if given != true:
            flipped.add(str(path))
    return flipped


def _run(module: str, *arguments: object, codes: tuple[int, ...] = (0,)) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode not in codes:
        raise SystemExit(f"{module}: {result.stderr}")


def found_by_audit(directory: Path, folds: int, epochs: float) -> list[str]:
    """Trains on each fold, gathers the predictions, and returns the paths whose labels the audit finds likely wrong,
    the surest first."""
    data, runs = directory / "digits", [directory / f"fold-{number}" for number in range(1, folds + 1)]
    for number, run in enumerate(runs, start=1):
        train(
            run,
            model_name_or_path="demo:vit",
            train_dir=data,
            fold=f"{number}/{folds}",
            num_train_epochs=epochs,
            eval_steps="no",
            augmentation="none",
            per_device_train_batch_size=32,
            gradient_accumulation_steps=1,
            learning_rate=8e-3,
            lr_scheduler_type="cosine",
        )
    _run("lora_dist.folds", *runs)
    predictions = ("--predictions", directory / "out_of_fold.jsonl", "--output_dir", directory / "audit")
    _run("lora_dist.audit", "--train_dir", data, *predictions, codes=(3, 4))
    report = json.loads((directory / "audit" / "report.json").read_text(encoding="utf-8"))
    return [one["files"][0]["path"] for one in report["findings"] if one["kind"] == "label_issue"]


def row(name: str, listed: Collection[str], flipped: set[str]) -> str:
    """A row of the table in docs/labels.md."""
    right = len(flipped.intersection(listed))
    return f"| {name} | {len(listed)} | {right / len(listed):.3f} | {right / len(flipped):.3f} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--keep", type=Path, help="directory to keep the data, the runs and the report in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.keep or Path(temporary)
        flipped = write_flipped(directory / "digits", arguments.share, arguments.seed)
        found = found_by_audit(directory, arguments.folds, arguments.epochs)
        predictions = read_predictions(directory / "out_of_fold.jsonl")
    pairs = zip(predictions.paths, predictions.given, predictions.predicted, strict=True)
    print("| listed | images | precision | recall |\n|---|---|---|---|")
    print(row("likely wrong", found, flipped))
    print(row(f"the {SUREST} surest of these", found[:SUREST], flipped))
    print(row("all whose predicted class is another one", [one for one, a, b in pairs if a != b], flipped))


if __name__ == "__main__":
    main()
