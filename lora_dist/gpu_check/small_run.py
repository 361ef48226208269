"""The flags of a small run on the packaged base, with images that are drawn here."""

from pathlib import Path

import numpy as np
from PIL import Image

BASE = "demo:vit"
CLASSES = ("dark", "light")
IMAGES = 24


def run_flags(directory: Path, images: int = IMAGES, **settings: object) -> list[str]:
    """Returns the flags of a run with batches of 8; `settings` override.

    Args:
        directory: for the images, which are drawn once, and the run.
        images: training images of each class.
        settings: further flags.
    """
    photos = directory / "photos"
    if not photos.exists():
        for label, name in enumerate(CLASSES):
            _draw(photos / "train" / name, label, images, seed=0)
            _draw(photos / "validation" / name, label, IMAGES, seed=1)
    common: dict[str, object] = {
        "model_name_or_path": BASE,
        "train_dir": photos / "train",
        "validation_dir": photos / "validation",
        "output_dir": directory / "run",
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
    }
    return [word for name, value in (common | settings).items() for word in (f"--{name}", str(value))]


def _draw(directory: Path, label: int, images: int, seed: int) -> None:
    """Writes noisy images whose brightness tells their class."""
    directory.mkdir(parents=True)
    random = np.random.default_rng((label, seed))
    for number in range(images):
        pixels = random.normal(80 + 90 * label, 30, (48, 64, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(directory / f"{number}.png")
