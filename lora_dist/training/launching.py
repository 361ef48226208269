"""Initializes the process group and the `Accelerator` of a run, and locks its output directory."""

from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator

from lora_dist.processes.preflight import Preflight
from lora_dist.processes.run_lock import OTHER_HOST_SECONDS, RunLock
from lora_dist.processes.runtime import launch
from lora_dist.settings.train import Settings


def launch_run(settings: Settings) -> Accelerator:
    """Initializes the process group and creates the `Accelerator` of a run. Errors as `launch`."""
    return launch(
        settings.optimization.mixed_precision,
        settings.run.ddp_timeout,
        tf32=settings.optimization.tf32,
        deterministic=settings.run.deterministic,
        bf16_base=settings.model.base_dtype == "bfloat16",
    )


def lock_output(lock: RunLock, root: Path, accelerator: Accelerator, ddp_timeout: int) -> None:
    """Takes the lock of an output directory on the first process. Called on every process.

    Args:
        lock: of this run.
        root: the directory; created if it does not exist.
        accelerator: tells the first process.
        ddp_timeout: seconds after which the other processes give up.

    Raises:
        UserError: on every process, if another run holds the lock; it names host, process and start of that run.
    """
    with Preflight(timedelta(seconds=ddp_timeout)).first_process_first("locked"):
        if accelerator.is_main_process:
            lock.take(root, "resume with --resume_from_checkpoint auto", min(OTHER_HOST_SECONDS, ddp_timeout / 2))
