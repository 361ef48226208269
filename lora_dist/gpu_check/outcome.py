"""A check: its arguments, its outcome (a text, `Failed` or `Skipped`), and the line that reports it."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator


class Failed(Exception):  # noqa: N818  (an outcome, as Skipped)
    """The check has failed; the message gives the reason."""


class Skipped(Exception):  # noqa: N818
    """The machine or the launch lacks a requirement of the check, which the message names."""


@dataclass(frozen=True)
class Machine:
    """The machine that the checks run on.

    Attributes:
        accelerator: of this process.
        directory: where checks may write; of this process.
    """

    accelerator: Accelerator
    directory: Path

    @property
    def has_gpu(self) -> bool:
        """Whether this process has a CUDA device."""
        return self.accelerator.device.type == "cuda"

    def require_gpu(self) -> None:
        """Raises `Skipped` without a CUDA device."""
        if not self.has_gpu:
            raise Skipped("needs a GPU")

    def require_one_process(self) -> None:
        """Raises `Skipped` in a launch of several processes."""
        if self.accelerator.num_processes > 1:
            raise Skipped("run python -m lora_dist.gpu_check, without a launcher, for this check")


def run_checks(checks: Iterable[Callable[[Machine], str]], machine: Machine) -> list[str]:
    """Runs the checks and prints a line for each: PASS, FAIL or SKIP, and why.

    The main process prints all of them, the others only failures.

    Returns:
        Names of those that failed.
    """
    failed = []
    for check in checks:
        start = time.monotonic()
        try:
            outcome, said = "PASS", check(machine)
        except Skipped as reason:
            outcome, said = "SKIP", str(reason)
        except Failed as reason:
            outcome, said = "FAIL", str(reason)
        except Exception as error:
            outcome, said = "FAIL", f"{type(error).__name__}: {error}"
        if outcome == "FAIL":
            failed.append(check.__name__)
        if machine.accelerator.is_main_process or outcome == "FAIL":
            print(f"{outcome}  {check.__name__:<15} {time.monotonic() - start:5.1f} s  {said}", flush=True)
    return failed
