"""Writes scikit-learn's handwritten digits as class folders of PNG files: `python -m lora_dist.demo.digits DIR`."""

import shutil
import sys
import tempfile
from pathlib import Path

from lora_dist.errors import UserError
from lora_dist.processes.lifetime import exit_on_user_error

VALIDATION_EVERY = 5


def write(directory: Path) -> None:
    """Writes `train/<digit>/*.png` and `validation/<digit>/*.png` (8x8 grey pixels) unless they exist.

    Holds out every fifth image of a class: 1,442 for training, 355 for validation. The rename at the end is atomic, so
    several processes may call this at once.
    """
    if directory.is_dir():
        return
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError('the demo\'s digits need scikit-learn: pip install "lora_dist[demo]"') from error
    from PIL import Image

    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    digits = load_digits()
    seen = dict.fromkeys(range(10), 0)
    for pixels, label in zip(digits.images, digits.target.tolist(), strict=True):
        split = "validation" if seen[label] % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "train"
        folder = aside / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * (255 / 16)).round().astype("uint8")).save(folder / f"{seen[label]:04d}.png")
        seen[label] += 1
    aside.chmod(0o755)
    try:
        aside.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
        shutil.rmtree(aside)


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Writes to the directory that is the only argument."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("usage: python -m lora_dist.demo.digits DIR")
    write(Path(argv[0]))
    print(f"wrote {argv[0]}/train and {argv[0]}/validation")


if __name__ == "__main__":
    main(sys.argv[1:])
