"""Creates the `Accelerator` and checks that it has the requested processes, engine and precision."""

import logging
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lora_dist.errors import UserError
from lora_dist.logs import set_up_logs
from lora_dist.processes.deepspeed_extension import compile_extension
from lora_dist.processes.devices import computes_on_cpu, cpu_has_bf16
from lora_dist.processes.preflight import Preflight
from lora_dist.processes.threads import share_cores

logger = logging.getLogger(__name__)

PACKAGES = ("lora_dist", "torch", "torchvision", "transformers", "peft", "accelerate", "datasets", "evaluate")

UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM: set distributed_type to MULTI_GPU, FSDP or DEEPSPEED",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config, which is not supported: remove it",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing: remove that and use --gradient_checkpointing",
}
"""Variables by which accelerate's launcher passes on what is not supported, and what to do instead."""


def launch(
    mixed_precision: Literal["auto", "no", "fp16", "bf16"],
    ddp_timeout: int = 1800,
    *,
    tf32: bool = False,
    deterministic: bool = False,
    bf16_base: bool = False,
) -> Accelerator:
    """Initializes the process group and creates the `Accelerator`.

    Args:
        mixed_precision: `auto` uses the value of the launch file, or else bf16 on CUDA devices that have it, fp16 on
            others, and fp32 elsewhere.
        ddp_timeout: seconds after which a process that waits for another gives up.
        tf32: compute fp32 matrix products on CUDA in TF32.
        deterministic: let torch choose deterministic algorithms only.
        bf16_base: the base will be in bf16, so that the launch has no mixed precision.

    Raises:
        UserError: the precision contradicts the launch file or is not supported by the device, there are more processes
            than GPUs, or some of the launched processes do not arrive in time or cannot connect.
        TrainingStoppedError: the process that hosts the store has ended.
    """
    _require_company()
    if engine_launched() == "FSDP":
        prepare_fsdp()
    refuse_unsupported()
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if deterministic:
        be_deterministic()
    on_cpu = computes_on_cpu()
    launched_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = choose_precision(mixed_precision, launched_precision, on_cpu, half_precision())
    if bf16_base:
        require_bf16(precision, on_cpu, engine_launched())
        precision = "no"
    if not on_cpu:
        require_devices(torch.accelerator.device_count())
    timeout = timedelta(seconds=ddp_timeout)
    preflight = Preflight(timeout)
    preflight.arrive("started")
    if on_cpu and engine_launched() == "DEEPSPEED":
        compile_extension()
    with preflight.connecting(), _refusals():
        accelerator = _make_accelerator(precision, on_cpu, timeout)
    if on_cpu and engine_launched() == "FSDP":
        # accelerate shards on GPUs alone, but torch anywhere; what follows is the same.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if precision != "no":
            accelerator.state.fsdp_plugin.set_mixed_precision(precision)
    _require_as_launched(accelerator, precision)
    if engine_launched() == "DEEPSPEED":
        # Otherwise from_pretrained would shard the model while it loads, and the code before ZeRO could not read, probe
        # or adapt it. Whole image models fit a host's memory.
        unset_hf_deepspeed_config()
    set_up_logs(accelerator.is_main_process)
    preflight.arrive("connected")
    preflight.time_all_reduce(accelerator)
    if on_cpu:
        share_cores()
    return accelerator


def _make_accelerator(precision: str, on_cpu: bool, timeout: timedelta) -> Accelerator:
    """Initializes the process group, unless an earlier run in this process has done so."""
    is_deepspeed = engine_launched() == "DEEPSPEED"
    # A single process names no backend: accelerate would expect a process group.
    backend = "gloo" if on_cpu and _launched_processes() > 1 else None
    if not is_deepspeed and is_initialized() and AcceleratorState().mixed_precision != precision:
        # The earlier run had another precision. The process group stays.
        AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=precision,
        # `cpu` would quietly turn ZeRO into plain data parallel.
        cpu=on_cpu and not is_deepspeed,
        kwargs_handlers=[
            InitProcessGroupKwargs(backend=backend, timeout=timeout),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
        # `backward` divides the loss by this number, which would otherwise come from the environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )


def _launched_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _require_as_launched(accelerator: Accelerator, precision: str) -> None:
    """Raises `UserError` if the processes, the engine or the precision are others than those of the launch."""
    if accelerator.num_processes != _launched_processes():
        unset = "" if "LOCAL_RANK" in os.environ else "LOCAL_RANK (rank within the node) is not set; "
        raise UserError(
            f"WORLD_SIZE is {_launched_processes()}, but the process group has {accelerator.num_processes} "
            f"process(es); {unset}see accelerate_configs/ for launch files that work"
        )
    if engine_launched() not in ("NO", accelerator.distributed_type.value):
        raise UserError(
            f"the launch file requests {engine_launched()}, but {accelerator.distributed_type.value} is in use; "
            f"see accelerate_configs/ for launch files that work"
        )
    if accelerator.mixed_precision != precision:
        raise UserError(
            f"mixed precision {precision} was requested, but {accelerator.mixed_precision} is in use; if a DeepSpeed "
            f"configuration file sets fp16 or bf16, remove it there and use --mixed_precision"
        )


@contextmanager
def _refusals() -> Iterator[None]:
    """Raises a `UserError` where accelerate cannot use what the launcher passes on."""
    try:
        yield
    except ValueError as error:
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        raise UserError(f"accelerate cannot use {file or 'the launch file or the environment'}: {error}") from error


def _require_company() -> None:
    """Raises an error if several processes were started but each would train alone and write to the same files."""
    if "WORLD_SIZE" in os.environ:
        return
    # `accelerate launch` sets MASTER_ADDR if several processes were requested, even where it starts only one.
    if "MASTER_ADDR" in os.environ:
        raise UserError(
            f"MASTER_ADDR={os.environ['MASTER_ADDR']} is set, but WORLD_SIZE is not: several processes were requested, "
            f"but only one was started. `accelerate launch --multi_gpu`, or distributed_type: MULTI_GPU in the launch "
            f"file, starts them, on CPUs too (see accelerate_configs/ddp_cpu.yaml). For a single process, set "
            f"num_processes: 1 or unset MASTER_ADDR."
        )
    if os.environ.get("RANK", "0") != "0":
        raise UserError(
            f"RANK={os.environ['RANK']} is set, but WORLD_SIZE is not: this process would train alone. Set WORLD_SIZE, "
            f"MASTER_ADDR and MASTER_PORT as well, or unset RANK."
        )
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(os.environ.get(name, "1")) > 1:
            raise UserError(
                f"{name}={os.environ[name]} but WORLD_SIZE is not set: each of these processes would train alone. "
                f"Start one task per node, and in each task run `accelerate launch --num_machines … "
                f"--machine_rank …`, as slurm/train.sbatch does."
            )


def prepare_fsdp() -> None:
    """Checks the FSDP version in the launch file and turns off CPU-RAM-efficient loading.

    Raises:
        UserError: the launch file requests FSDP version 1, which is not supported.
    """
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"FSDP version {version} is not supported; set fsdp_version: 2 in the launch file, as in "
            f"accelerate_configs/fsdp2.yaml"
        )
    # If true, from_pretrained loads the weights only in the first process. Image models fit in a host's memory.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def engine_launched() -> str:
    """The engine in the launch file: DEEPSPEED, FSDP, or NO for a single process or plain data parallel."""
    for engine in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            return engine
    return "NO"


def refuse_unsupported() -> None:
    """Refuses what the launch file or the environment requests and this package does not support.

    Raises:
        UserError: torch dynamo, which renames all weights; Megatron-LM, a `parallelism_config`, or FSDP's activation
            checkpointing.
    """
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise UserError(
            f"the launch file (dynamo_config) or ACCELERATE_DYNAMO_BACKEND requests torch dynamo ({backend}): remove "
            f"that and use --torch_compile"
        )
    for variable, advice in UNSUPPORTED.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(f"the launch file or {variable} requests {advice}")
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1" and engine_launched() != "DEEPSPEED":
        logger.warning(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=%s is ignored: use --gradient_accumulation_steps", accumulation
        )


def require_devices(count: int) -> None:
    """Raises an error if torchrun or accelerate started more processes on this machine than it has devices.

    Processes that were started otherwise may each see a device of their own.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" in os.environ and processes > count:
        raise UserError(
            f"{processes} processes were started on this machine, which has {count} GPU{'s' * (count > 1)}: set "
            f"num_processes in the launch file, or accelerate launch --num_processes, to the number of GPUs"
        )


def be_deterministic() -> None:
    """Makes torch choose deterministic algorithms, or raise an error where an operation has none.

    Must be called before the first operation on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS sums in any order on several streams
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextmanager
def torch_flags_restored() -> Iterator[None]:
    """Restores the flags of torch that `launch` changes, for a caller that has other work to do."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    # The older flag cannot be read where a caller has set the newer one, which torch 2.8 lacks.
    tf32 = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = torch.get_deterministic_debug_mode(), getattr(matmul, tf32), cudnn.benchmark
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        setattr(matmul, tf32, before[1])
        cudnn.benchmark = before[2]


def require_bf16(precision: str, on_cpu: bool, engine: str) -> None:
    """Raises an error where the base cannot be in bf16.

    Args:
        precision: as `choose_precision` returns.
        on_cpu: whether the machine has no accelerator.
        engine: as `engine_launched` returns.
    """
    if engine == "DEEPSPEED":
        raise UserError(
            "--base_dtype bfloat16: DeepSpeed allows only one dtype. With --mixed_precision bf16 it keeps all weights "
            "in bf16, and an fp32 copy of those that train"
        )
    if precision == "fp16":
        raise UserError("--base_dtype bfloat16: the launch file asks for fp16, or this GPU has no bf16")
    if on_cpu and not cpu_has_bf16():
        logger.warning("bf16 is very slow on this CPU; --base_dtype float32 is the faster choice")


def half_precision() -> str:
    """Returns the half precision to use: "bf16" from compute capability 8.0 on, "fp16" on older GPUs, "no" on a CPU."""
    if computes_on_cpu() or not torch.cuda.is_available():
        return "no"
    device = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def choose_precision(requested: str, launched: str, on_cpu: bool, half: str) -> str:
    """The precision to train in, from the setting, the launch file and the device.

    Args:
        requested: the setting.
        launched: the value of the launch file.
        on_cpu: whether the machine has no accelerator.
        half: as `half_precision` returns.

    Raises:
        UserError: the setting contradicts the launch file, or the device does not support the precision.
    """
    if launched == "fp8":
        raise UserError("the launch file says mixed_precision: fp8, which is not supported: set bf16 there")
    if requested != "auto" and launched != "no" and requested != launched:
        raise UserError(
            f"--mixed_precision {requested}, but the launch file says mixed_precision: {launched}; remove one of them"
        )
    precision = requested if requested != "auto" else launched
    if on_cpu and precision == "fp16":
        raise UserError("fp16 needs a GPU, and this process computes on the CPU; use --mixed_precision no (fp32)")
    if on_cpu and precision == "bf16" and not cpu_has_bf16():
        logger.warning("bf16 is very slow on this CPU; --mixed_precision no (fp32) is the faster choice")
    return half if requested == "auto" and launched == "no" else precision


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
    """Returns the versions of Python and of the packages that affect results."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


@cache
def _version(name: str) -> str:
    return metadata.version(name)


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
        # The package may be installed inside the repository of another project, which does not track it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
