"""Checks the machine: `python -m lora_dist.gpu_check`, or `accelerate launch … -m lora_dist.gpu_check`."""

import argparse
import sys
import tempfile
from pathlib import Path

from lora_dist.processes.lifetime import exit_on_user_error, run_command
from lora_dist.processes.parent_death import end_with_launcher


@exit_on_user_error
def main() -> None:
    """Runs all checks, prints a line for each, and exits with 1 if one fails."""
    argparse.ArgumentParser(
        prog="lora_dist.gpu_check",
        description="Check this machine: prints a line for each check, with PASS, FAIL or SKIP and why. Takes minutes, "
        "and needs no network. Exit codes: 0 nothing failed, 1 a check failed.",
    ).parse_args()
    end_with_launcher()
    # Imported here, so that the command ends with its launcher even while it imports torch.
    import os

    from lora_dist.gpu_check import commands, in_process
    from lora_dist.gpu_check.outcome import Machine, run_checks
    from lora_dist.processes.runtime import launch

    checks = (
        in_process.hardware,
        in_process.lora_layer,
        in_process.model_input,
        in_process.splits,
        in_process.waits,
        in_process.bandwidth,
        commands.train_fp32,
        commands.train_bf16,
        commands.train_fp16,
        commands.train_bf16_base,
        commands.repeat,
        commands.resume,
        commands.predict,
        commands.ddp,
        commands.fsdp2,
        commands.zero1,
        commands.zero3,
        commands.benchmark,
    )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    accelerator = launch("no" if launched == "no" else "auto")
    with tempfile.TemporaryDirectory() as directory:
        failed = run_checks(checks, Machine(accelerator, Path(directory)))
    accelerator.end_training()
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
