"""Launches a run by its settings."""

from accelerate import Accelerator

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
