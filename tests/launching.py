"""Real launches in subprocesses, with a free port, one thread a process and a time-out."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TIMEOUT = 240


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a launch."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | extra


def command(module: str, arguments: Sequence[object], launch_file: str | None = None) -> list[str]:
    """The command line of a module, plain or through `accelerate launch` with a file of `accelerate_configs/`."""
    words = [str(argument) for argument in arguments]
    if launch_file is None:
        return [sys.executable, "-m", module, *words]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    return [*launcher, str(ROOT / "accelerate_configs" / launch_file), "--main_process_port", "0", "-m", module, *words]


def run(
    module: str,
    *arguments: object,
    launch_file: str | None = None,
    code: int | None = 0,
    cwd: Path | None = None,
    **extra: str,
) -> subprocess.CompletedProcess[str]:
    """Runs a module to its end and checks the exit code (None for any other than 0)."""
    result = subprocess.run(
        command(module, arguments, launch_file),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment(**extra),
        cwd=cwd,
        check=False,
    )
    wrong = result.returncode == 0 if code is None else result.returncode != code
    assert not wrong, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def train(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `lora_dist.train`."""
    return run("lora_dist.train", *arguments, **options)


def predict(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `lora_dist.predict`."""
    return run("lora_dist.predict", *arguments, **options)


def results_of(output_dir: Path) -> dict[str, Any]:
    """The content of `all_results.json`."""
    return json.loads((output_dir / "all_results.json").read_text(encoding="utf-8"))


def lines_of(output_dir: Path) -> list[dict[str, Any]]:
    """The content of `metrics.jsonl`."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
