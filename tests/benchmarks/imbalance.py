"""What class weights, focal loss and balanced sampling do to macro F1: the demo's digits at 1:50, three seeds each.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/imbalance.py

Of the digits 0 to 4, 100 images each are trained on, and of 5 to 9 two each; the validation images are all 355. Each
run adds a row to `results/imbalance.csv`.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from statistics import mean

from result_files import add_rows
from training_runs import SEEDS, train

from lora_dist.demo import local_path

MANY, FEW = 100, 2
WAYS: dict[str, dict[str, object]] = {
    "plain": {},
    "class weights": {"class_weights": "balanced"},
    "focal loss": {"focal_gamma": 2},
    "balanced sampling": {"balanced_sampling": "true"},
}


def write_digits(directory: Path, seed: int) -> None:
    """Writes the training images of a seed."""
    for label in range(10):
        files = sorted(Path(local_path("demo:digits/train"), str(label)).glob("*.png"))
        count = MANY if label < 5 else FEW
        (directory / str(label)).mkdir(parents=True)
        for number in range(count):
            file = files[(seed * count + number) % len(files)]
            shutil.copy(file, directory / str(label) / file.name)


def metrics(digits: Path, output: Path, seed: int, epochs: int, more: dict[str, object]) -> dict[str, float]:
    """Metrics of a run on the validation images."""
    results = train(
        output, config="demo", train_dir=digits, seed=seed, num_train_epochs=epochs, eval_steps="no", **more
    )
    return {name: results[f"eval_{name}"] for name in ("accuracy", "balanced_accuracy", "macro_f1")}


def main() -> None:
    """Prints the mean and range of macro F1 of each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    arguments = parser.parse_args()
    epochs, ways = arguments.epochs, arguments.ways
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for seed in SEEDS:
            write_digits(root / f"train-{seed}", seed)
            for number, way in enumerate(ways):
                found = metrics(root / f"train-{seed}", root / f"run-{seed}-{number}", seed, epochs, WAYS[way])
                rows.append({"way": way, "seed": seed, "epochs": epochs, **found})
                print(rows[-1], flush=True)
    add_rows("imbalance.csv", rows)
    for way in ways:
        scores = [float(row["macro_f1"]) for row in rows if row["way"] == way]
        print(f"{way}: macro F1 {mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})")


if __name__ == "__main__":
    main()
