"""Searches hyperparameters: `python -m lora_dist.sweep [--search NAME=RANGE …] [flags of lora_dist.train]`."""

import logging
import os
import sys
from pathlib import Path

from lora_dist.errors import TrainingStoppedError, UserError
from lora_dist.extras import require
from lora_dist.processes.lifetime import exit_on_user_error, run_command
from lora_dist.processes.run_lock import RunLock
from lora_dist.settings.cli import argv_or, parse
from lora_dist.settings.sweep import SweepSettings, contradictions
from lora_dist.storage.writable import require_writable, writing

DESCRIPTION = """Search hyperparameters with Optuna: trains with values from the ranges of --search, stops runs that are
worse than others, and writes a table, a picture and the best settings. Takes the flags of lora_dist.train. Each run
trains in a process of its own, on one GPU or the CPU. The same command continues a sweep that was stopped."""


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Trains the trials that are missing, and reports all of them.

    Raises:
        UserError: a setting is wrong, another sweep uses the directory, or no trial is complete.
        PreemptedError: a signal stopped the sweep.
    """
    settings = parse(
        SweepSettings, argv_or(argv), prog="lora_dist.sweep", description=DESCRIPTION, contradictions=contradictions
    )
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "WORLD_SIZE"} & os.environ.keys():
        raise UserError("a sweep starts its runs itself, each in one process: start it by python -m lora_dist.sweep")
    require("sweep", "lora_dist.sweep", "optuna", "matplotlib")
    root = Path(settings.run.output_dir)
    require_writable(root)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lora_dist").setLevel(logging.INFO)
    with RunLock() as lock, writing(root, "output_dir"):
        lock.take(root)
        sweep(settings, root)


def sweep(settings: SweepSettings, root: Path) -> None:
    """Trains the trials that are missing in a directory whose lock is held, and reports all of them."""
    from lora_dist.sweep.report import report
    from lora_dist.sweep.study import open_sweep
    from lora_dist.sweep.trials import run_trials

    found = open_sweep(root, settings)
    run_trials(found)
    if not report(found):
        raise TrainingStoppedError(f"none of the trials is complete; {root}/trial-*/log.txt say why")


if __name__ == "__main__":
    run_command(main)
