"""This trainer and the guide's in turns, each turn a process of its own: `python -m lora_dist.bench.compare WHO …`.

A fresh process meets no caches, threads or memory of the other, and its peak memory is its own. Loading the model is
not timed; the first updates, until the loader's workers are in step, are made and not counted.
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
from lora_dist.processes.huge_pages import environment_before, move_to_huge_pages
from lora_dist.processes.launcher import end_with_parent
from lora_dist.processes.lifetime import exit_on_user_error, run_command
from lora_dist.settings.bench import BenchSettings, contradictions
from lora_dist.settings.cli import argv_or, parse

CONTENDERS = ("ours", "trainer")


class Turn(NamedTuple):
    """What a turn took.

    Attributes:
        images_per_second: over all processes.
        peak_memory_mb: of the process that takes most, on the device or as a whole (2**20 bytes).
    """

    images_per_second: float
    peak_memory_mb: float


class Comparison(NamedTuple):
    """Medians over rounds; ratios are between the two turns of a round.

    Attributes:
        ours: this trainer.
        trainer: the guide's.
        faster: images/s of ours over those of the other.
        lowest: the same in the round where it was lowest.
        highest: and highest.
        memory: peak of ours over that of the other.
        rounds: their number.
    """

    ours: Turn
    trainer: Turn
    faster: float
    lowest: float
    highest: float
    memory: float
    rounds: int

    @classmethod
    def of(cls, rounds: list[tuple[Turn, Turn]]) -> "Comparison":
        """From the turns of each round, ours first."""
        ours, trainer = (Turn(*map(median, zip(*turns, strict=True))) for turns in zip(*rounds, strict=True))
        ratios = [mine.images_per_second / other.images_per_second for mine, other in rounds]
        memory = median(mine.peak_memory_mb / other.peak_memory_mb for mine, other in rounds)
        return cls(ours, trainer, median(ratios), min(ratios), max(ratios), memory, len(rounds))


def compare(argv: list[str], rounds: int) -> Comparison:
    """Both in turns, with the flags of the benchmark. Called on every process of a launch, before they join.

    Raises:
        UserError: a turn failed.
    """
    turns = [_in_a_process(argv, contender, number) for number, contender in enumerate(CONTENDERS * rounds)]
    return Comparison.of(list(zip(turns[::2], turns[1::2], strict=True)))


def _in_a_process(argv: list[str], contender: str, number: int) -> Turn:
    environment = environment_before(os.environ)
    if "MASTER_PORT" in environment:
        # The processes of a turn meet by themselves, and not where those of the benchmark will.
        environment["MASTER_PORT"] = str(int(environment["MASTER_PORT"]) + 1 + number)
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    command = [sys.executable, "-m", "lora_dist.bench.compare", contender, *argv]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise UserError(f"turn {number + 1}, of {contender}, ended with code {result.returncode}; see above")
    return Turn(**json.loads(result.stdout.splitlines()[-1]))


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Takes one turn, and prints it as JSON."""
    end_with_parent(signal.SIGTERM)
    contender, *flags = argv_or(argv)
    settings = parse(BenchSettings, flags, prog="lora_dist.bench", description="", contradictions=contradictions)
    if __name__ == "__main__" and contender == "ours":
        move_to_huge_pages()
    with tempfile.TemporaryDirectory() as directory:
        turn = take_turn(contender, settings, Path(directory))
    print(json.dumps(turn._asdict()))


def take_turn(contender: str, settings: BenchSettings, directory: Path) -> Turn:
    """Trains as one of `CONTENDERS` does. Called on every process."""
    from accelerate.utils import gather_object

    from lora_dist.training.reporting.throughput import peak_memory_mb

    if contender == "ours":
        from lora_dist.bench.measure import assemble_unwritten, time_loaded
        from lora_dist.processes.runtime import launch

        accelerator = launch(settings.optimization.mixed_precision, settings.run.ddp_timeout)
        job, device = assemble_unwritten(settings, accelerator, directory), accelerator.device
        with job.watch.watching():
            samples, seconds, _ = time_loaded(job, settings.measuring.updates)
    else:
        from lora_dist.bench.trainer_baseline import time_guide

        samples, seconds, device = time_guide(settings, directory)
    seconds, peak = (max(gather_object([value])) for value in (seconds, peak_memory_mb(device)))
    return Turn(samples / seconds, peak)


if __name__ == "__main__":
    run_command(main)
