"""How many threads a launched process computes on: its share of the cores, unless the user has set a number."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lora_dist_testing.launching import ROOT

from lora_dist.processes.cores import available_cores

SCRIPT = """
import torch
from lora_dist.processes.threads import share_cores
share_cores()
print("threads", torch.get_num_threads())
"""


def _threads(directory: Path, *launcher: str, **variables: str) -> int:
    (directory / "script.py").write_text(SCRIPT, encoding="utf-8")
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    result = subprocess.run(
        [sys.executable, *launcher, str(directory / "script.py")],
        env=inherited | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout.split("threads")[1])


ACCELERATE = ("-m", "accelerate.commands.launch", "--num_processes", "1")


@pytest.mark.skipif(available_cores() < 2, reason="needs two cores")
def test_a_launcher_that_was_told_nothing_leaves_the_choice(tmp_path: Path) -> None:
    """`accelerate launch` sets OMP_NUM_THREADS=1."""
    assert _threads(tmp_path, *ACCELERATE) == available_cores()


@pytest.mark.parametrize(
    ("words", "variables"), [((), {"OMP_NUM_THREADS": "1"}), (("--num_cpu_threads_per_process", "1"), {})]
)
def test_a_number_from_the_user_stays(words: tuple[str, ...], variables: dict[str, str], tmp_path: Path) -> None:
    assert _threads(tmp_path, *ACCELERATE, *words, **variables) == 1


def test_processes_without_a_launcher_share_the_cores(tmp_path: Path) -> None:
    assert _threads(tmp_path, LOCAL_WORLD_SIZE=str(available_cores())) == 1
    assert _threads(tmp_path, OMP_NUM_THREADS="1") == 1
