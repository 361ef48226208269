"""CPU time and memory that an evaluation of 10,000 classes and 20,000 images adds to the forward passes.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/many_classes.py

Computes the metrics, draws the picture of confused classes and writes evaluation.json, as every evaluation does. Adds a
row to `results/many_classes.csv`.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from result_files import add_rows

from lora_dist.figures import confusion_picture
from lora_dist.metrics.classification import ClassificationMetric
from lora_dist.training.problems.single_label_problem import SCALARS, SingleLabel, SingleLabelEvaluation
from lora_dist.training.reporting.report import write_evaluation


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def evaluate(classes: int, images: int, directory: Path) -> dict[str, object]:
    """Does what follows the forward passes, on random predictions of which half are right."""
    random = np.random.default_rng(0)
    true = random.integers(0, classes, images)
    predicted = np.where(random.random(images) < 0.5, true, random.integers(0, classes, images))
    before, start = _peak_mb(), time.process_time()
    results = ClassificationMetric(classes).compute(
        predictions=predicted,
        references=true,
        confidences=random.random(images),
        ranks=(predicted != true).astype(np.int64),
        losses=random.random(images),
    )
    evaluation = SingleLabelEvaluation(
        metrics={name: results[name] for name in SCALARS},
        per_class=results["per_class"],
        confusion=np.array(results["confusion"], dtype=np.int64).reshape(-1, 3),
        predictions=predicted,
        confidences=random.random(images),
        losses=random.random(images),
        num_samples=images,
        references=true,
    )
    labels = [f"class {number}" for number in range(classes)]
    confusion_picture(evaluation.confusion, labels)
    write_evaluation(directory / "evaluation.json", SingleLabel(), evaluation, labels)
    seconds = time.process_time() - start
    return {
        "classes": classes,
        "images": images,
        "seconds": round(seconds, 2),
        "megabytes": round(_peak_mb() - before),
        "file_mb": round((directory / "evaluation.json").stat().st_size / 1e6, 2),
    }


def main() -> None:
    """Prints the row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        row = evaluate(arguments.classes, arguments.images, Path(directory))
    print(row)
    add_rows("many_classes.csv", [row])


if __name__ == "__main__":
    main()
