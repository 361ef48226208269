"""The `Accelerator` for this launch, and whether what was launched is what is running."""

import logging
import os
import platform
import subprocess
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lora_dist.errors import UserError
from lora_dist.logs import set_up_logs
from lora_dist.processes.preflight import Preflight

logger = logging.getLogger(__name__)

PACKAGES = ("lora_dist", "torch", "torchvision", "transformers", "peft", "accelerate", "datasets", "evaluate")


def launch(mixed_precision: Literal["auto", "no", "fp16", "bf16"], ddp_timeout: int = 1800) -> Accelerator:
    """Joins the other processes of this launch.

    Args:
        mixed_precision: `auto` follows the launch file, and else takes fp16 on a CUDA device and fp32 elsewhere.
        ddp_timeout: seconds after which a process that waits for another gives up.

    Raises:
        UserError: a precision that the device cannot train in or that contradicts the launch file, or fewer
            processes than were launched, or than arrive in time, or than can connect to each other.
        TrainingStoppedError: the process that the others meet at has ended.
    """
    _require_company()
    if engine_launched() == "FSDP":
        prepare_fsdp()
    on_cpu = not torch.accelerator.is_available()
    precision = choose_precision(mixed_precision, os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), on_cpu)
    timeout = timedelta(seconds=ddp_timeout)
    preflight = Preflight(timeout)
    preflight.arrive("started")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Named only where there is a group to join: a backend makes accelerate expect one.
    group = InitProcessGroupKwargs(backend="gloo" if on_cpu and launched > 1 else None, timeout=timeout)
    with preflight.connecting():
        accelerator = Accelerator(
            mixed_precision=precision,
            # `cpu` would quietly turn ZeRO into plain data parallel.
            cpu=on_cpu and engine_launched() != "DEEPSPEED",
            kwargs_handlers=[group, DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    if accelerator.num_processes != launched:
        unset = "" if "LOCAL_RANK" in os.environ else "LOCAL_RANK, the number of this process on its host, is not set; "
        raise UserError(
            f"{launched} processes were launched but this one runs in a group of {accelerator.num_processes}; {unset}"
            f"see accelerate_configs/ for launch files that work"
        )
    if on_cpu and engine_launched() == "FSDP":
        # accelerate shards on GPUs alone, but torch anywhere; what follows is the same.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if engine_launched() not in ("NO", accelerator.distributed_type.value):
        raise UserError(
            f"the launch file asks for {engine_launched()} but {accelerator.distributed_type.value} is running; "
            f"see accelerate_configs/ for launch files that work"
        )
    if accelerator.mixed_precision != precision:
        raise UserError(
            f"mixed precision is to be {precision}, but {accelerator.mixed_precision} is running; if a DeepSpeed "
            f"configuration file sets fp16 or bf16, leave that to --mixed_precision"
        )
    if engine_launched() == "DEEPSPEED":
        # Or from_pretrained shards the model as it loads it, and leaves nothing to read, probe or adapt before ZeRO
        # takes it over. Whole image models fit a host's memory.
        unset_hf_deepspeed_config()
    set_up_logs(accelerator.is_main_process)
    preflight.arrive("connected")
    preflight.time_all_reduce(accelerator)
    if on_cpu:
        _hint_at_threads()
    return accelerator


def _require_company() -> None:
    """Refuses a process that would train alone, next to others that do the same into the same files."""
    if "WORLD_SIZE" in os.environ:
        return
    # accelerate's launcher of single processes sets it if it was asked for several, and starts one all the same.
    if "MASTER_ADDR" in os.environ:
        raise UserError(
            f"MASTER_ADDR={os.environ['MASTER_ADDR']} is set but not WORLD_SIZE: several processes were asked for and "
            f"this one was started alone. In the launch file, distributed_type: MULTI_GPU starts them, on CPUs as well "
            f"(accelerate_configs/ddp_cpu.yaml); for a run of one process, num_processes: 1, or unset MASTER_ADDR."
        )
    if os.environ.get("RANK", "0") != "0":
        raise UserError(
            f"RANK={os.environ['RANK']} is set but not WORLD_SIZE: this process would train by itself. Set WORLD_SIZE, "
            f"MASTER_ADDR and MASTER_PORT as well, or unset RANK."
        )
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(os.environ.get(name, "1")) > 1:
            raise UserError(
                f"{name}={os.environ[name]} but WORLD_SIZE is not set: each of these processes would train by itself. "
                f"Start one task a node, and the processes in it by accelerate launch --num_machines … "
                f"--machine_rank …; slurm/train.sbatch does so."
            )


def prepare_fsdp() -> None:
    """Looks after what launch files for other programs say of FSDP.

    Raises:
        UserError: they ask for its first version, which is not supported.
    """
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"the launch file asks for FSDP of version {version}; write fsdp_version: 2, as in "
            f"accelerate_configs/fsdp2.yaml"
        )
    # With it, from_pretrained leaves all processes but the first without weights. Image models fit a host's memory.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def _hint_at_threads() -> None:
    """`accelerate launch` gives each process a single thread unless told otherwise."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.get_num_threads() < cores:
        logger.info(
            f"computing on {torch.get_num_threads()} of {cores} cores a process; "
            f"accelerate launch --num_cpu_threads_per_process {cores} would use them all"
        )


def engine_launched() -> str:
    """The engine that `accelerate launch` asks for beyond plain data parallel: DEEPSPEED, FSDP or NO."""
    for engine in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            return engine
    return "NO"


def choose_precision(asked: str, launched: str, on_cpu: bool) -> str:
    """The precision to train in, from the setting, the launch file and the device.

    Raises:
        UserError: they contradict each other.
    """
    if asked != "auto" and launched != "no" and asked != launched:
        raise UserError(
            f"--mixed_precision {asked}, but the launch file says mixed_precision: {launched}; drop one of them"
        )
    wanted = asked if asked != "auto" else launched
    if on_cpu and wanted == "fp16":
        raise UserError("fp16 needs a GPU and this machine has none; use --mixed_precision no (fp32)")
    if on_cpu and wanted == "bf16":
        logger.warning("bf16 is very slow on most CPUs; --mixed_precision no (fp32) is the faster choice there")
    if asked == "auto" and launched == "no" and torch.cuda.is_available():
        return "fp16"
    return wanted


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, hardware and git state, for the record of a run."""
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else _processor()
    return {
        "versions": versions(),
        "device": device,
        "num_processes": accelerator.num_processes,
        "distributed_type": str(accelerator.distributed_type.value),
        "mixed_precision": accelerator.mixed_precision,
        "git_commit": git_commit(Path(__file__).parent),
    }


def versions() -> dict[str, str]:
    """Of Python and of what a result depends on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {os.cpu_count()} cores"


def git_commit(directory: Path) -> str | None:
    """The commit of the code in a directory, with `+` where that has changes; None where it is not under git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=directory, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        # An environment may lie in the repository of another project, which does not keep what is installed.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def cores_per_process() -> int:
    """Number of cores of this machine for each of its processes."""
    return len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
