"""How many of the labels that are flipped on purpose the audit finds: precision and recall on the demo's digits.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/label_noise.py [--several]

Flips the labels of a share of scikit-learn's digits, trains the demo's model on each of five folds, gathers them, and
runs the audit, all by the commands that users run. With --several, a digit has the labels of `LABELS`, and a share of
these decisions is flipped.
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
from lora_dist.metrics.predictions import Predictions, read_predictions

CLASSES = 10
LABELS = {"even": {0, 2, 4, 6, 8}, "prime": {2, 3, 5, 7}, "square": {0, 1, 4, 9}, "loop": {0, 6, 8, 9}}
SUREST = 40

Found = tuple[str, str]
"""Path of an image, and the label that is wrong; none for its class."""


def _images() -> list[Path]:
    return sorted(Path(local_path("demo:digits/train")).parent.rglob("*.png"))


def write_flipped(directory: Path, share: float, seed: int) -> set[Found]:
    """Writes all digits as class folders, a share of them in that of another class; returns the paths of these."""
    images = _images()
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
            flipped.add((str(path), ""))
    return flipped


def write_flipped_sets(directory: Path, share: float, seed: int) -> set[Found]:
    """Writes all digits in one folder, and a file of their labels in which a share of the decisions is flipped."""
    images = _images()
    flips = np.random.default_rng(seed).random((len(images), len(LABELS))) < share
    directory.mkdir(parents=True)
    lines = ["path,label"]
    flipped: set[Found] = set()
    for index, (image, flip) in enumerate(zip(images, flips, strict=True)):
        path = directory / f"{index:04d}.png"
        shutil.copy(image, path)
        own = (int(image.parent.name) in digits for digits in LABELS.values())
        shown = [name for name, has, is_wrong in zip(LABELS, own, flip, strict=True) if has != is_wrong]
        lines.append(f"{path.name},{';'.join(shown)}")
        flipped.update((str(path), name) for name, is_wrong in zip(LABELS, flip, strict=True) if is_wrong)
    directory.with_suffix(".csv").write_text("\n".join(lines), encoding="utf-8")
    return flipped


def _run(module: str, *arguments: object, codes: tuple[int, ...] = (0,)) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode not in codes:
        raise SystemExit(f"{module}: {result.stderr}")


def found_by_audit(directory: Path, folds: int, epochs: float, multi_label: bool) -> list[Found]:
    """Trains on each fold, gathers the predictions, and returns what the audit finds likely wrong, the surest first."""
    data: dict[str, object] = {"train_dir": directory / "digits"}
    if multi_label:
        data |= {"labels_file": directory / "digits.csv", "problem_type": "multi_label_classification"}
    runs = [directory / f"fold-{number}" for number in range(1, folds + 1)]
    for number, run in enumerate(runs, start=1):
        train(
            run,
            model_name_or_path="demo:vit",
            **data,
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
    _run("lora_dist.audit", *(f"--{name}={value}" for name, value in data.items()), *predictions, codes=(3, 4))
    report = json.loads((directory / "audit" / "report.json").read_text(encoding="utf-8"))
    issues = [one for one in report["findings"] if one["kind"] == "label_issue"]
    return [(one["files"][0]["path"], one["message"].split(" (")[0] if multi_label else "") for one in issues]


def other_answers(predictions: Predictions) -> list[Found]:
    """The images whose predicted class is another one than the given one, or their labels that differ."""
    pairs = zip(predictions.paths, predictions.given, predictions.predicted, strict=True)
    if predictions.multi_label:
        return [(path, name) for path, given, said in pairs for name in sorted({*given} ^ {*said})]
    return [(path, "") for path, given, said in pairs if given != said]


def row(name: str, listed: Collection[Found], flipped: set[Found]) -> str:
    """A row of the table in docs/labels.md."""
    right = len(flipped.intersection(listed))
    return f"| {name} | {len(listed)} | {right / len(listed):.3f} | {right / len(flipped):.3f} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--several", action="store_true", help="several labels per image")
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--keep", type=Path, help="directory to keep the data, the runs and the report in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.keep or Path(temporary)
        write = write_flipped_sets if arguments.multi_label else write_flipped
        flipped = write(directory / "digits", arguments.share, arguments.seed)
        found = found_by_audit(directory, arguments.folds, arguments.epochs, arguments.multi_label)
        predictions = read_predictions(directory / "out_of_fold.jsonl")
    print(f"| listed | {'labels' if arguments.multi_label else 'images'} | precision | recall |\n|---|---|---|---|")
    print(row("likely wrong", found, flipped))
    print(row(f"the {SUREST} surest of these", found[:SUREST], flipped))
    others = "that the thresholds decide otherwise" if arguments.multi_label else "whose predicted class is another one"
    print(row(f"all {others}", other_answers(predictions), flipped))


if __name__ == "__main__":
    main()
