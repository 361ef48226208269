"""The reference case of the benchmark on disk: a DINOv2-S with random weights, and JPEGs of 512 x 384 in ten classes.

PYTHONPATH=. python tests/benchmarks/reference.py runs/reference
"""

import sys
from pathlib import Path
from typing import Any

from predict_speed import make_classifier, make_jpegs

CLASSES, IMAGES = 10, 64
IMAGE_SIZE = 112


def main(directory: Path) -> None:
    """Writes `dinov2_s/` and `photos/`, with one sub-folder a class."""
    classifier = make_classifier("dinov2_s", IMAGE_SIZE)
    model: Any = classifier.model
    model.save_pretrained(directory / "dinov2_s")
    classifier.processor.save_pretrained(directory / "dinov2_s")
    for number in range(CLASSES):
        folder = directory / "photos" / f"class_{number}"
        folder.mkdir(parents=True, exist_ok=True)
        make_jpegs(folder, IMAGES, (512, 384))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
