"""Runs of the training command, each in a process of its own, and their accuracy over several seeds."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

SEEDS = (1, 2, 3)


def train(output: Path, **settings: object) -> dict[str, Any]:
    """Trains, and returns the content of `all_results.json`.

    Raises:
        RuntimeError: the run failed; the message is its output.
    """
    arguments = [f"--{name}={value}" for name, value in (settings | {"output_dir": output}).items()]
    command = [sys.executable, "-m", "lora_dist.train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return json.loads((output / "all_results.json").read_text(encoding="utf-8"))


def accuracies(run: Callable[[int], dict[str, Any]]) -> dict[str, object]:
    """The accuracy of a run with each of `SEEDS`, and their mean, as columns of a row."""
    found = {f"seed_{seed}": round(run(seed)["eval_accuracy"], 4) for seed in SEEDS}
    return {"mean": round(mean(found.values()), 4), **found}
