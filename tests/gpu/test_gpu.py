"""The check of the machine on a GPU: every check passes, or is skipped for want of a package or of a second GPU."""

import subprocess
import sys

import pytest


@pytest.mark.gpu
def test_the_machine_passes() -> None:
    result = subprocess.run([sys.executable, "-m", "lora_dist.gpu_check"], capture_output=True, text=True, check=False)
    outcomes = {line.split()[1]: line.split()[0] for line in result.stdout.splitlines() if line[4:6] == "  "}
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert "FAIL" not in outcomes.values()
    for name in (
        "model_input",
        "splits",
        "waits",
        "train_bf16",
        "train_fp16",
        "train_bf16_base",
        "repeat",
        "resume",
        "predict",
        "fsdp2",
        "benchmark",
    ):
        assert outcomes[name] == "PASS", result.stdout
