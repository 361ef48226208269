"""Real launches in subprocesses, with a free port, one thread a process and a time-out."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lora_dist.training.saving.checkpoint import COMPLETE, STATE

ROOT = Path(__file__).parents[3]
TIMEOUT = 240


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a launch."""
    common = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | common | {"HF_DATASETS_CACHE": _cache_of_datasets().name} | extra


@cache
def _cache_of_datasets() -> tempfile.TemporaryDirectory[str]:
    """A cache of `datasets` for all launches, apart from the user's."""
    return tempfile.TemporaryDirectory()


def flags(**settings: object) -> list[str]:
    """Settings as command-line flags: `flags(train_dir=photos, lora_r=4)`.

    None leaves a flag out, booleans become `true` and `false`, and lists are joined by commas.
    """
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", _word(value))]


def _word(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def run_flags(model: Path, data: Path, output_dir: Path, **settings: object) -> list[str]:
    """Flags of a run on `data/train` and `data/validation`, with batches of 8 in float32; `settings` override."""
    common = {
        "model_name_or_path": model,
        "train_dir": data / "train",
        "validation_dir": data / "validation",
        "output_dir": output_dir,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "mixed_precision": "no",
    }
    return flags(**common | settings)


EVERY_UPDATE: dict[str, object] = {
    "num_train_epochs": 2,
    "logging_steps": 1,
    "checkpointing_steps": 1,
    "save_total_limit": 99,
    "lora_dropout": 0,
    "learning_rate": 1e-3,
}
"""Settings of a run of two epochs whose updates can be compared with those of another run: all are logged and saved."""


RESULTS = {
    "adapter",
    "all_results.json",
    "config.yaml",
    "evaluation.json",
    "metrics.jsonl",
    "split.json",
    "validation_predictions.jsonl",
}
"""Files of a finished run with LoRA, besides its checkpoints and the events of TensorBoard."""


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


def said_by_processes(result: subprocess.CompletedProcess[str]) -> str:
    """Standard error without the summary at its end, in which torchrun repeats what the failed processes said."""
    return result.stderr.partition("=" * 40)[0]


def train(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `lora_dist.train`."""
    return run("lora_dist.train", *arguments, **options)


def predict(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `lora_dist.predict`."""
    return run("lora_dist.predict", *arguments, **options)


class Launch:
    """A command that runs in a session of its own, as a terminal or a scheduler starts it.

    Attributes:
        process: of the command itself; where that is a launcher, the ranks are others.
    """

    def __init__(self, log: Path, words: Sequence[str], extra: dict[str, str]) -> None:
        self._log = log
        # Inherited by all that it starts, however that detaches itself.
        self._mark = f"{os.getpid()}-{time.monotonic_ns()}"
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                words,
                env=environment(LAUNCH_MARK=self._mark, **extra),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """What it has said so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, condition: Callable[[], object], seconds: float = TIMEOUT) -> None:
        """Waits until something is the case, while it runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended too early, with {self.process.returncode}\n{self.text}"
            assert time.monotonic() < end, f"waited too long\n{self.text}"
            time.sleep(0.005)

    def wait(self, seconds: float = TIMEOUT) -> int:
        """Waits until the command has ended and nothing that it started is left; returns its exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None or self.processes():
            assert time.monotonic() < end, f"{self.processes()} still there\n{self.text}"
            time.sleep(0.05)
        return self.process.returncode

    def processes(self) -> list[psutil.Process]:
        """All processes of it that run."""
        running = psutil.process_iter(["environ"])
        return [one for one in running if (one.info["environ"] or {}).get("LAUNCH_MARK") == self._mark]

    def workers(self) -> list[psutil.Process]:
        """The processes that the command has started, but for the one that keeps track of shared memory."""
        found = []
        for one in self.processes():
            with suppress(psutil.NoSuchProcess):
                if one.pid != self.process.pid and "resource_tracker" not in " ".join(one.cmdline()):
                    found.append(one)
        return found

    def rank(self, number: int) -> psutil.Process:
        """The training process of a rank; the workers of its loader have another parent."""
        ranks = (one for one in self.processes() if one.ppid() == self.process.pid)
        return next(one for one in ranks if one.environ().get("RANK") == str(number))


@contextmanager
def started(
    log: Path, *arguments: object, module: str = "lora_dist.train", launch_file: str | None = None, **extra: str
) -> Iterator[Launch]:
    """Starts a module, with its output in a file; whatever of it still runs at the end is killed."""
    launch = Launch(log, command(module, arguments, launch_file), extra)
    try:
        yield launch
    finally:
        for one in launch.processes():
            one.kill()
        launch.process.wait()


def results_of(output_dir: Path) -> dict[str, Any]:
    """The content of `all_results.json`."""
    return json.loads((output_dir / "all_results.json").read_text(encoding="utf-8"))


def lines_of(output_dir: Path) -> list[dict[str, Any]]:
    """The content of `metrics.jsonl`."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def saved_in(output_dir: Path) -> dict[str, Any]:
    """The progress in the newest checkpoint."""
    newest = sorted((output_dir / "checkpoints").glob("step-*"))[-1]
    return json.loads((newest / "state.json").read_text(encoding="utf-8"))["progress"]


def scalars_of(output_dir: Path, tag: str) -> list[tuple[int, float]]:
    """Steps and values of a curve in TensorBoard."""
    reader = EventAccumulator(str(output_dir / "tensorboard"))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def adapter_of(output_dir: Path) -> dict[str, Tensor]:
    """The weights handed over, of an adapter or a whole model."""
    whole = output_dir / "model" / "model.safetensors"
    return load_file(whole if whole.exists() else output_dir / "adapter" / "adapter_model.safetensors")


TIMINGS = {
    "train/samples_per_second",
    "train/data_wait",
    "train/peak_memory_mb",
    "train/step_time",
    "train/step_time_slowest_rank",
}


def assert_same_run(output_dir: Path, expected: Path) -> None:
    """Two runs have the same adapter and the same curves, to the bit; measured times aside."""
    adapter = adapter_of(expected)
    for name, tensor in adapter_of(output_dir).items():
        assert tensor.equal(adapter[name]), name
    lines, others = (
        [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines_of(root)]
        for root in (output_dir, expected)
    )
    assert lines == others
    tags = {name for line in others for name in line if "/" in name}
    assert {"train/loss", "eval/loss"} <= tags
    for tag in tags:
        assert scalars_of(output_dir, tag) == scalars_of(expected, tag), tag


def rewrite_states(out: Path, change: Any) -> None:
    """Changes the state in every checkpoint of a run, as another release would have written it."""
    for path in (out / "checkpoints").iterdir():
        state = json.loads((path / STATE).read_text())
        change(state)
        (path / STATE).write_text(json.dumps(state))
        manifest = json.loads((path / COMPLETE).read_text())
        content = (path / STATE).read_bytes()
        manifest[STATE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (path / COMPLETE).write_text(json.dumps(manifest))
