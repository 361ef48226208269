"""How many training images a core prepares: the PEFT guide's pipeline, and the ways that this project has.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/input_speed.py
    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/input_speed.py --memory 6

The JPEGs are cut out of the packaged photographs. The contenders take turns in every round, on the same files, batch by
batch in this process, and what counts is CPU time: a ratio is the median over rounds of what stands in the same round.
`guide` decodes with Pillow and applies the guide's torchvision transforms. The others are what a worker process does;
what is left for the device (8 bits to floats, normalising, and resizing with --augment_on_device) is `finish`, measured
here on this CPU. Each run adds its rows to `results/input_speed.csv`. With `--memory` no clock is read: for each way, a
loader with two workers goes over the files that many times. `results/input_memory.csv` gets what its process holds, and
what the workers hold besides what they share with it.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from PIL import Image
from predict_speed import make_jpegs
from result_files import add_rows
from torchvision import transforms as torchvision_transforms
from transformers import ViTImageProcessor

from lora_dist.data.batch import TrainImages
from lora_dist.data.cache.image_cache import cached
from lora_dist.data.loader import batches, train_loader
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sampling.order import BatchPlan
from lora_dist.data.sources.load import load_data
from lora_dist.data.sources.split import Split
from lora_dist.settings.train import AugmentationSettings, DataSettings

JPEG_SIZE = (512, 384)
BATCH = 32
CPU = torch.device("cpu")


def training_split(folder: Path, count: int) -> Split:
    """That many JPEGs of one class."""
    (folder / "a").mkdir()
    make_jpegs(folder / "a", count, JPEG_SIZE)
    train = load_data(DataSettings(train_dir=str(folder), validation_dir=str(folder)), seed=0).train
    assert isinstance(train, Split)
    return train


def images_of(split: Any, on_device: bool = False) -> tuple[TrainImages, BatchPlan]:
    """A split as it trains, with the default augmentation for a ViT of 224 pixels."""
    settings = AugmentationSettings(augment_on_device=on_device)
    images = TrainImages(split, ImageTransforms(ViTImageProcessor(), settings), settings, seed=0)
    return images, BatchPlan(split.sample_order(0), BATCH, 1, 1, 0)


def guide(split: Split) -> Callable[[], None]:
    """The pipeline of https://huggingface.co/docs/peft/task_guides/image_classification_lora."""
    processor = ViTImageProcessor()
    transform = torchvision_transforms.Compose(
        [
            torchvision_transforms.RandomResizedCrop(processor.size["height"]),
            torchvision_transforms.RandomHorizontalFlip(),
            torchvision_transforms.ToTensor(),
            torchvision_transforms.Normalize(mean=processor.image_mean, std=processor.image_std),
        ]
    )

    def run() -> None:
        for first in range(0, len(split), BATCH):
            rows = range(first, min(first + BATCH, len(split)))
            torch.stack([transform(Image.open(split.name(row)).convert("RGB")) for row in rows])

    return run


def ours(split: Any, on_device: bool = False, finish: bool = False) -> Callable[[], None]:
    """An epoch of what a worker process does, or of what it leaves to the device."""
    images, order = images_of(split, on_device)
    epoch = [batch for step in range(order.steps_per_epoch) for batch in order.micro_batches(step)]
    prepared = [images.prepared(samples) for samples in epoch] if finish else []

    def run() -> None:
        for samples in epoch:
            images.prepared(samples)

    def run_rest() -> None:
        for batch in prepared:
            images.finished(batch)

    return run_rest if finish else run


def watch_memory(name: str, split: Any, on_device: bool, epochs: int) -> list[dict[str, object]]:
    """What this process holds in all, and two workers of its loader on their own, six times in so many epochs."""
    images, order = images_of(split, on_device)
    settings = DataSettings(dataloader_num_workers=2)
    loader = train_loader(images, order, 0, epochs * order.steps_per_epoch, settings, CPU)
    process = psutil.Process()
    rows: list[dict[str, object]] = []
    for number, _ in enumerate(batches(loader), 1):
        if number % (order.steps_per_epoch * max(1, epochs // 6)) == 0:
            workers = process.children()
            own = sum(worker.memory_full_info().uss for worker in workers)
            rows.append(
                {"input": name, "images": len(images), "epoch": number // order.steps_per_epoch}
                | {"process_mb": round(process.memory_info().rss / 1e6, 1)}
                | {"workers": len(workers), "workers_mb": round(own / 1e6, 1)}
            )
            print(rows[-1], flush=True)
    return rows


def in_fresh_processes(ways: list[tuple[str, Any, bool]], epochs: int) -> list[dict[str, object]]:
    """`watch_memory` of each way in a process of its own, so that none inherits what another has left."""
    rows: list[dict[str, object]] = []
    for way in ways:
        # Its workers are forked as those of the command are, which they would not be from one that is spawned.
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            rows += pool.submit(watch_memory, *way, epochs).result()
    return rows


def main() -> None:
    """Prints the medians of each contender, and how they compare with the guide's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=int, metavar="EPOCHS")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "photos").mkdir()
        split = training_split(Path(folder) / "photos", arguments.images)
        start = time.perf_counter()
        cache: Any = cached(split, str(Path(folder) / "cache"), (224, 224), build=True)
        print(f"cached in {time.perf_counter() - start:.1f} s")
        if arguments.memory:
            ways = [("files", split, False), ("cache", cache, False), ("cache, augment_on_device", cache, True)]
            add_rows("input_memory.csv", in_fresh_processes(ways, arguments.memory), anew=True)
            return
        runs = {
            "guide": guide(split),
            "files": ours(split),
            "cache": ours(cache),
            "cache, augment_on_device": ours(cache, on_device=True),
            "finish": ours(cache, finish=True),
            "finish, augment_on_device": ours(cache, on_device=True, finish=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(arguments.rounds + 1):
            for name in [*runs, *reversed(runs)][number % 2 * len(runs) :][: len(runs)]:
                before = time.process_time()
                runs[name]()
                # The first round fills the caches of files.
                seconds[name] += [time.process_time() - before] if number else []
    conditions: dict[str, object] = {
        "jpeg": f"{JPEG_SIZE[0]}x{JPEG_SIZE[1]}",
        "image_size": 224,
        "images": arguments.images,
        "batch_size": BATCH,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "rounds": arguments.rounds,
        "torch": torch.__version__,
    }
    print(conditions)
    print(f"{'':28}{'CPU ms/image':>13}{'images/s a core':>17}{'faster than the guide by':>26}{'from':>7}{'to':>7}")
    rows = []
    for name, taken in seconds.items():
        ratios = [theirs / own for theirs, own in zip(seconds["guide"], taken, strict=True)]
        milliseconds = 1000 * median(taken) / arguments.images
        print(f"{name:28}{milliseconds:13.3f}{1000 / milliseconds:17.0f}{median(ratios):26.2f}", end="")
        print(f"{min(ratios):7.2f}{max(ratios):7.2f}")
        rows.append(
            conditions
            | {"contender": name, "cpu_ms_per_image": round(milliseconds, 3)}
            | {"images_per_second_a_core": round(1000 / milliseconds), "faster_than_guide_by": round(median(ratios), 2)}
            | {"lowest": round(min(ratios), 2), "highest": round(max(ratios), 2)}
        )
    add_rows("input_speed.csv", rows)


if __name__ == "__main__":
    main()
