"""How `slurm/node.sh` starts the processes of a node, with a stand-in for `accelerate` that prints its arguments."""

import os
import subprocess
from pathlib import Path

import pytest
from lora_dist_testing.launching import ROOT

CONFIGS = ROOT / "accelerate_configs"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, f"--config_file {CONFIGS}/ddp_cpu.yaml --num_machines"),
        ({"SLURM_GPUS_ON_NODE": "2"}, f"--config_file {CONFIGS}/ddp_bf16.yaml --mixed_precision no --num_machines"),
        ({"SLURM_GPUS_ON_NODE": "2", "LAUNCH_FILE": "a b.yaml"}, "--config_file a b.yaml --num_machines"),
    ],
)
def test_the_training_chooses_its_precision_on_gpus(variables: dict[str, str], expected: str, tmp_path: Path) -> None:
    """`no` in place of the launch file's bf16, which older GPUs lack."""
    accelerate = tmp_path / "accelerate"
    accelerate.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    accelerate.chmod(0o755)
    node = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PROJECT_DIR": str(ROOT),
        "SLURM_CPUS_ON_NODE": "8",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_JOB_ID": "1",
        "SLURMD_NODENAME": "n1",
        "MAIN_ADDRESS": "n1",
        "MAIN_PORT": "29500",
    }
    result = subprocess.run(
        ["bash", str(ROOT / "slurm" / "node.sh"), "--config", "demo"],
        env=node | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected in result.stdout
    assert f"--num_processes {variables.get('SLURM_GPUS_ON_NODE', '1')}" in result.stdout
