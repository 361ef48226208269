"""The command `predict` as users start it: on one core, on all cores, on two processes; and what long inputs cost.

    PYTHONPATH=. python tests/benchmarks/predict_scale.py speed
    PYTHONPATH=. python tests/benchmarks/predict_scale.py memory 1000 10000
    PYTHONPATH=. python tests/benchmarks/predict_scale.py names 1000 1000000

`speed` has a ViT-S with random weights and JPEG files cut out of the packaged photographs. The ways of starting take
turns in every round, and a ratio is the median over rounds of what stands in the same round. Seconds count from the
line `predicting on …`, when the model is loaded, to the end of the command. `memory` has as many JPEG files of 32 x 32
and the demo's model; `names` has a list of as many paths, of which all but 100 are missing. Both tell the peak memory,
and the CPU time with that of the start, which other programs on the machine hardly change. Each run adds its rows to
`results/predict_scale.csv`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from predict_speed import JPEG_SIZE, make_classifier, make_jpegs
from result_files import add_rows

from lora_dist.processes.cores import available_cores

ROOT = Path(__file__).parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "ddp_cpu.yaml")]
TWO = [sys.executable, *LAUNCH, "--num_processes", "2", "--main_process_port", "0", "-m", "lora_dist.predict"]
PLAIN = [sys.executable, "-m", "lora_dist.predict"]
ONE_CORE, TWO_PROCESSES, ALL_CORES = "one process on one core", "two processes", "one process on all cores"


def save_model(directory: Path, name: str) -> Path:
    """Writes a whole model as `--model` takes it."""
    classifier = make_classifier(name, 224)
    model = classifier.model
    model.config.id2label = dict(enumerate(classifier.labels))  # type: ignore[union-attr]
    model.config.label2id = {label: index for index, label in enumerate(classifier.labels)}  # type: ignore[union-attr]
    model.save_pretrained(directory)  # type: ignore[operator]
    classifier.processor.save_pretrained(directory)
    return directory


class Run(NamedTuple):
    """Seconds after the model is loaded, CPU seconds in all, and the peak of the memory in MB."""

    seconds: float
    cpu: float
    peak: float


def run(command: Sequence[str], core: int | None = None) -> Run:
    """Runs a command, on one core if that is given."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    loaded = None
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    if core is not None:
        os.sched_setaffinity(process.pid, {core})
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("predicting on"):
            loaded = time.perf_counter()
    _, status, usage = os.wait4(process.pid, 0)
    # Exit code 1: images are missing, as they should be in `names`.
    assert os.waitstatus_to_exitcode(status) in (0, 1), "".join(lines)
    assert loaded is not None, "".join(lines)
    return Run(time.perf_counter() - loaded, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def speed(folder: Path, images: int, rounds: int) -> list[dict[str, object]]:
    """Prints and returns images per second of the three ways of starting, and how they compare."""
    model = save_model(folder / "model", "vit_s")
    photos = folder / "photos"
    photos.mkdir()
    make_jpegs(photos, images, JPEG_SIZE)
    first = min(os.sched_getaffinity(0))
    ways = {ONE_CORE: (PLAIN, first), TWO_PROCESSES: (TWO, None), ALL_CORES: (PLAIN, None)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in [*ways, *reversed(ways)][number % 2 * len(ways) :][: len(ways)]:
            command, core = ways[name]
            output = folder / f"{number} {re.sub(' ', '_', name)}.parquet"
            words = [*command, "--model", str(model), "--images", str(photos), "--output", str(output)]
            seconds[name].append(run(words, core).seconds)
    rows: list[dict[str, object]] = []
    for name, found in seconds.items():
        ratios = [one / other for one, other in zip(seconds[ONE_CORE], found, strict=True)]
        rows.append(
            {
                "what": name,
                "images": images,
                "seconds": round(median(found), 1),
                "images_per_second": round(images / median(found), 2),
                "cpu_seconds": "",
                "peak_mb": "",
                "faster_than_one_core": round(median(ratios), 2),
                "lowest": round(min(ratios), 2),
                "highest": round(max(ratios), 2),
            }
        )
    return rows


def cost(folder: Path, what: str, counts: Sequence[int]) -> list[dict[str, object]]:
    """Prints and returns seconds and peak memory of the demo's model on inputs of several lengths."""
    model = save_model(folder / "model", "demo")
    made = make_jpegs(folder, 100, (32, 32))
    rows: list[dict[str, object]] = []
    for count in counts:
        listed = made[:100]
        if what == "memory":
            listed = [str(folder / f"{count} {number}.jpg") for number in range(count)]
            for number, path in enumerate(listed):
                Path(path).hardlink_to(made[number % 100])
        else:
            step = count // 100
            listed = [
                made[n // step] if n % step == 0 and n < 100 * step else f"{folder}/gone/{n:08d}.jpg"
                for n in range(count)
            ]
        names = folder / f"{count}.txt"
        names.write_text("\n".join(listed), encoding="utf-8")
        output = folder / f"{count}.parquet"
        words = [*PLAIN, "--model", str(model), "--images_from", str(names), "--output", str(output)]
        found = run(words)
        rows.append(
            {
                "what": what,
                "images": count,
                "seconds": round(found.seconds, 1),
                "images_per_second": round(count / found.seconds, 1),
                "cpu_seconds": round(found.cpu, 1),
                "peak_mb": round(found.peak),
                "faster_than_one_core": "",
                "lowest": "",
                "highest": "",
            }
        )
    return rows


def main() -> None:
    """Runs what the command line asks for, and writes the rows down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "memory", "names"])
    parser.add_argument("counts", nargs="*", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    conditions = {"cpus": available_cores(), "load": round(os.getloadavg()[0], 1), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "speed":
            (images,) = arguments.counts or [192]
            rows = speed(Path(folder), images, arguments.rounds)
        else:
            rows = cost(Path(folder), arguments.what, arguments.counts)
    for row in rows:
        print({name: value for name, value in row.items() if value != ""})
    add_rows("predict_scale.csv", [row | conditions for row in rows])


if __name__ == "__main__":
    main()
