"""The training process of a trial: its start, its evaluations, its end, and why it failed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_dist.processes.parent_death import end_with_parent

PRUNED_SECONDS = 60.0
"""Seconds that a pruned run may take to end before it is killed."""
LOG = "log.txt"
_LOG_BYTES = 65_536
_REASON_LINES = 4
_LABEL = "error: "


class TrialProcess:
    """A training process that resumes from its newest checkpoint, and ends with this process.

    Attributes:
        is_pruned: whether it was ended because others are better.
    """

    def __init__(self, output: Path, flags: Sequence[str], environment: Mapping[str, str]) -> None:
        """
        Args:
            output: directory of the run, which also gets its log.
        """
        self.output, self.is_pruned = output, False
        self._size_read, self._deadline, self._asked = 0, math.inf, False
        output.mkdir(exist_ok=True)
        words = [*flags, "--output_dir", str(output), "--resume_from_checkpoint", "auto"]
        with (output / LOG).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lora_dist.train", *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the sweep, which passes it on.
                start_new_session=True,
                # Otherwise a run outlives a killed sweep, and holds its GPU and the lock of its directory.
                preexec_fn=end_with_parent,
            )

    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs. Kills a process that takes too long."""
        if time.monotonic() > self._deadline:
            self.kill()
        return self._process.poll()

    def evaluations(self, metric: str) -> list[float]:
        """Returns the metric of all evaluations so far, NaN if it is not finite; empty if nothing is new in the log."""
        try:
            content = (self.output / "metrics.jsonl").read_bytes()
        except FileNotFoundError:
            return []
        if len(content) == self._size_read:
            return []
        self._size_read = len(content)
        lines = [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
        values = [line[f"eval/{metric}"] for line in lines if f"eval/{metric}" in line]
        return [math.nan if value is None else value for value in values]

    def result(self) -> dict[str, Any]:
        """The results of a run that has been finished."""
        return json.loads((self.output / "all_results.json").read_text(encoding="utf-8"))

    def ask_to_end(self) -> None:
        """Makes the run save and end."""
        if not self._asked:
            self._process.terminate()
            self._asked = True

    def prune(self) -> None:
        """Ends the run, within `PRUNED_SECONDS`."""
        if not self.is_pruned:
            self.is_pruned, self._deadline = True, time.monotonic() + PRUNED_SECONDS
            self.ask_to_end()

    def kill(self) -> None:
        """Kills the run with all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def failure(self) -> str:
        """Returns the reason of a failure on one line: the error in the log, or else the last line of the log."""
        code = self._process.returncode
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        with (self.output / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        starts = [number for number, line in enumerate(lines) if line.startswith(_LABEL)]
        shown = lines[starts[-1] :][:_REASON_LINES] if starts else lines[-1:]
        return " ".join(" ".join(shown).removeprefix(_LABEL).split()) or f"exit code {code}"
