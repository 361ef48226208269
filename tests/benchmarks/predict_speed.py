"""How fast `predict` goes over a folder of JPEGs: against the bare model, and against `transformers.pipeline`.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/predict_speed.py vit_s
    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/predict_speed.py demo --memory 10000

Weights are random, which changes no time; the JPEGs are cut out of the packaged photographs. The contenders take turns
in every round, each with the same model, files and threads, and a ratio is the median over rounds of what stands in the
same round, so that whatever else the machine does meets all of them. `unwrapped` is the model alone, on pixels prepared
before the clock starts. CPU time counts all processes of a contender. Each run adds its rows to
`results/predict_speed.csv`. With `--memory` no clock is read: `predict` goes over that many files, and its memory is
written to `results/predict_memory.csv` on the way.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from result_files import add_rows
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Dinov2Config,
    ViTConfig,
    ViTImageProcessor,
    pipeline,
)

from lora_dist.data.pixels.images import load_rgb
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.demo import local_path, photographs
from lora_dist.deployment.classify import Inference, choose_batch_size, classify
from lora_dist.model.trained.classifier import Classifier
from lora_dist.processes.huge_pages import restart_with_huge_pages

SMALL: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "num_labels": 101}
JPEG_SIZE = (500, 375)
JPEG_QUALITY = 90
CPU = torch.device("cpu")


def make_classifier(name: str, image_size: int) -> Classifier:
    """A ViT-S or DINOv2-S with random weights, or the demo's base model, whose size is fixed."""
    torch.manual_seed(0)
    if name == "demo":
        directory = local_path("demo:vit")
        model = AutoModelForImageClassification.from_pretrained(directory, dtype=torch.float32)
        processor: Any = AutoImageProcessor.from_pretrained(directory)
    else:
        config = (
            ViTConfig(**SMALL, intermediate_size=1536, image_size=image_size)
            if name == "vit_s"
            else Dinov2Config(**SMALL, mlp_ratio=4, image_size=image_size, patch_size=14)
        )
        model = AutoModelForImageClassification.from_config(config)
        processor = ViTImageProcessor(size={"height": image_size, "width": image_size})
    labels = [f"class {number}" for number in range(model.config.num_labels)]
    return Classifier(model.eval(), processor, labels)


def make_jpegs(directory: Path, count: int, size: tuple[int, int]) -> list[str]:
    """Files of `size`, each another piece of a photograph."""
    photos = [Image.open(path).convert("RGB") for path in photographs()]
    random = np.random.default_rng(0)
    files = []
    for number in range(count):
        photo = photos[number % len(photos)]
        width, height = (int(side * random.uniform(0.5, 0.9)) for side in photo.size)
        left, top = int(random.integers(photo.width - width)), int(random.integers(photo.height - height))
        piece = photo.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
        files.append(str(directory / f"{number:05d}.jpg"))
        piece.save(files[-1], quality=JPEG_QUALITY)
    return files


def contenders(classifier: Classifier, files: Sequence[str], batch_size: int) -> dict[str, Callable[[], None]]:
    """Each goes over all files once."""
    prepare = ImageTransforms(classifier.processor)
    pixels = [
        prepare.batch([load_rgb(file) for file in files[start : start + batch_size]])
        for start in range(0, len(files), batch_size)
    ]
    model: Any = classifier.model
    pipe = pipeline("image-classification", model=model, image_processor=classifier.processor, device=CPU)

    @torch.inference_mode()
    def bare() -> None:
        for part in pixels:
            classifier.model(pixel_values=part)

    def predict() -> None:
        inference = Inference(CPU, batch_size=batch_size)
        assert all(row.error is None for row in classify(classifier, files, inference, top_k=1))

    def pipeline_as_it_is() -> None:
        pipe(list(files), top_k=1)

    def pipeline_in_batches() -> None:
        pipe(list(files), top_k=1, batch_size=batch_size, num_workers=1)

    return {
        "bare": bare,
        "predict": predict,
        "pipeline": pipeline_as_it_is,
        f"pipeline, batches of {batch_size}, 1 worker": pipeline_in_batches,
    }


def measure(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds on the clock, and CPU seconds of this process and of the children that it waited for."""
    start, cpu = time.perf_counter(), _cpu_seconds()
    run()
    return time.perf_counter() - start, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def watch_memory(classifier: Classifier, files: Sequence[str], batch_size: int) -> None:
    """Goes over all files once, and writes down ten times what the process and its worker keep."""
    inference = Inference(CPU, batch_size=batch_size, num_workers=1)
    own = psutil.Process()
    rows: list[dict[str, object]] = []
    for done, row in enumerate(classify(classifier, files, inference, top_k=1), 1):
        assert row.error is None
        if done % (len(files) // 10) == 0:
            memory = [one.memory_info().rss / 1e6 for one in (own, *own.children())]
            rows.append({"files": done, "process_mb": round(memory[0], 1), "workers_mb": round(sum(memory[1:]), 1)})
            print(rows[-1])
    add_rows("predict_memory.csv", rows, anew=True)


def main() -> None:
    """Prints the medians of each contender, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["vit_s", "dinov2_s", "demo"])
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, metavar="FILES")
    arguments = parser.parse_args()
    if arguments.memory:
        restart_with_huge_pages()  # as the command does
    classifier = make_classifier(arguments.model, arguments.image_size)
    transforms = classifier.transforms()
    arguments.batch_size = choose_batch_size(arguments.batch_size, CPU, transforms)
    size = (32, 32) if arguments.model == "demo" else JPEG_SIZE
    with tempfile.TemporaryDirectory() as folder:
        if arguments.memory:
            made = make_jpegs(Path(folder), 100, size)
            files = [f"{made[number % 100]}.{number}.jpg" for number in range(arguments.memory)]
            for number, file in enumerate(files):
                Path(file).hardlink_to(made[number % 100])
            watch_memory(classifier, files, arguments.batch_size)
            return
        files = make_jpegs(Path(folder), arguments.images, size)
        runs = contenders(classifier, files, arguments.batch_size)
        few = contenders(classifier, files[: arguments.batch_size + 1], arguments.batch_size)
        for run in few.values():
            run()
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for number in range(arguments.rounds):
            for name in [*runs, *reversed(runs)][number % 2 * len(runs) :][: len(runs)]:
                results[name].append(measure(runs[name]))
    conditions: dict[str, object] = {
        "model": arguments.model,
        "image_size": ImageTransforms(classifier.processor).height,
        "jpeg": f"{size[0]}x{size[1]}",
        "images": len(files),
        "batch_size": arguments.batch_size,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "rounds": arguments.rounds,
        "torch": torch.__version__,
    }
    print(conditions)
    print(f"{'':36}{'images/s':>9}{'CPU ms/image':>14}{'predict is faster by':>22}{'from':>7}{'to':>6}")
    rows = []
    for name, timings in results.items():
        seconds, cpu = (median(column) for column in zip(*timings, strict=True))
        ratios = [other / own for (other, _), (own, _) in zip(timings, results["predict"], strict=True)]
        rate, milliseconds = len(files) / seconds, 1000 * cpu / len(files)
        print(f"{name:36}{rate:9.1f}{milliseconds:14.2f}{median(ratios):22.3f}{min(ratios):7.2f}{max(ratios):6.2f}")
        rows.append(
            conditions
            | {"contender": name, "images_per_second": round(rate, 1), "cpu_ms_per_image": round(milliseconds, 2)}
            | {"predict_is_faster_by": round(median(ratios), 3)}
            | {"lowest": round(min(ratios), 3), "highest": round(max(ratios), 3)}
        )
    add_rows("predict_speed.csv", rows)


if __name__ == "__main__":
    main()
