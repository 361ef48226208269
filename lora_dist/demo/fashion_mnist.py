"""Writes Fashion-MNIST as parquet files, to pretrain the demo's base: `python -m lora_dist.demo.fashion_mnist DIR`.

Reads the files of the original distribution, as Debian's package dataset-fashion-mnist installs them.
"""

import gzip
import io
import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow

from lora_dist.errors import UserError
from lora_dist.processes.lifetime import exit_on_user_error

SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
FILES = {"train": "train", "test": "t10k"}


def write(directory: Path, source: Path = SOURCE) -> None:
    """Writes `train.parquet` (60,000 images of 28x28 grey pixels) and `test.parquet` (10,000) from four gzipped idx
    files; raises `UserError` if the source is missing."""
    if not source.is_dir():
        raise UserError(f"{source} is missing: apt-get install dataset-fashion-mnist, or give a directory as well")
    directory.mkdir(parents=True, exist_ok=True)
    for split, prefix in FILES.items():
        images = _read(source / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = _read(source / f"{prefix}-labels-idx1-ubyte.gz", 8)
        table = Dataset.from_dict(
            {"image": [{"bytes": _png(image), "path": None} for image in images], "label": labels.tolist()},
            features=Features({"image": Image(), "label": ClassLabel(names=CLASSES)}),
        )
        table.to_parquet(directory / f"{split}.parquet")


def _read(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Writes to the first argument; reads from the second, if given."""
    if len(argv) not in (1, 2) or argv[0].startswith("-"):
        raise UserError("usage: python -m lora_dist.demo.fashion_mnist DIR [SOURCE]")
    write(Path(argv[0]), *map(Path, argv[1:]))
    print(f"wrote {argv[0]}/train.parquet and {argv[0]}/test.parquet")


if __name__ == "__main__":
    main(sys.argv[1:])
