"""Compares this trainer with `transformers.Trainer`: `python -m lora_dist.bench.compare ours|trainer …` measures one.

Each measurement is a new process, so that caches, threads and peak memory are its own. Loading the model and the warmup
updates are not timed.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

from lora_dist.errors import UserError
from lora_dist.processes.huge_pages import environment_before, restart_with_huge_pages
from lora_dist.processes.lifetime import exit_on_user_error, run_command
from lora_dist.processes.parent_death import end_with_parent
from lora_dist.settings.bench import BenchSettings, contradictions
from lora_dist.settings.cli import argv_or, parse

TRAINERS = ("ours", "trainer")


class Throughput(NamedTuple):
    """Images per second over all processes, and the largest peak memory of a process, in MiB."""

    images_per_second: float
    peak_memory_mb: float


class Comparison(NamedTuple):
    """Medians over all rounds, with the names of their columns. Ratios are ours / trainer within a round."""

    rounds: int
    our_images_per_second: float
    trainer_images_per_second: float
    faster_than_trainer: float
    lowest: float
    highest: float
    our_memory_mb: float
    trainer_memory_mb: float
    memory_of_trainer: float

    @classmethod
    def of(cls, rounds: list[tuple[Throughput, Throughput]]) -> "Comparison":
        """Summarizes pairs of (ours, trainer)."""
        speeds, memories = zip(*(zip(*pair, strict=True) for pair in rounds), strict=True)
        our_speed, trainer_speed = map(median, zip(*speeds, strict=True))
        our_memory, trainer_memory = map(median, zip(*memories, strict=True))
        ratios = [ours / trainer for ours, trainer in speeds]
        memory = median(ours / trainer for ours, trainer in memories)
        speed = (our_speed, trainer_speed, median(ratios), min(ratios), max(ratios))
        return cls(len(rounds), *speed, our_memory, trainer_memory, memory)


def compare(argv: list[str], rounds: int) -> Comparison:
    """Measures both trainers alternately. Called on every process of a launch, before the process group exists.

    Raises:
        UserError: A measurement failed.
    """
    found = [_in_new_process(argv, trainer, number) for number, trainer in enumerate(TRAINERS * rounds)]
    return Comparison.of(list(zip(found[::2], found[1::2], strict=True)))


def _in_new_process(argv: list[str], trainer: str, number: int) -> Throughput:
    environment = environment_before(os.environ)
    if "MASTER_PORT" in environment:
        # A port of their own: the process group of the benchmark uses the original one.
        environment["MASTER_PORT"] = str(int(environment["MASTER_PORT"]) + 1 + number)
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    command = [sys.executable, "-m", "lora_dist.bench.compare", trainer, *argv]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise UserError(f"measurement {number + 1} ({trainer}) failed with exit code {result.returncode}; see above")
    return Throughput(**json.loads(result.stdout.splitlines()[-1]))


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Measures one trainer and prints the result as JSON."""
    end_with_parent(signal.SIGTERM)
    trainer, *flags = argv_or(argv)
    settings = parse(BenchSettings, flags, prog="lora_dist.bench", description="", contradictions=contradictions)
    if __name__ == "__main__" and trainer == "ours":
        restart_with_huge_pages()
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure_trainer(trainer, settings, Path(directory))._asdict()))


def measure_trainer(trainer: str, settings: BenchSettings, directory: Path) -> Throughput:
    """Measures one of `TRAINERS`. Called on every process."""
    from accelerate.utils import gather_object

    from lora_dist.training.reporting.throughput import peak_memory_mb

    if trainer == "ours":
        from lora_dist.bench.measure import assemble_unwritten, time_loaded
        from lora_dist.training.launching import launch_run

        accelerator = launch_run(settings)
        run, device = assemble_unwritten(settings, accelerator, directory), accelerator.device
        with run.watch.watching():
            samples, seconds, _ = time_loaded(run, settings.benchmark.updates)
    else:
        from lora_dist.bench.trainer_baseline import time_baseline

        samples, seconds, device = time_baseline(settings, directory)
    seconds, peak = (max(gather_object([value])) for value in (seconds, peak_memory_mb(device)))
    return Throughput(samples / seconds, peak)


if __name__ == "__main__":
    run_command(main)
