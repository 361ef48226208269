"""Checks within this process: hardware, the LoRA layer, model input, gradients, waits for the device, all-reduce."""

import platform
import statistics
import time
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributed import all_reduce

from lora_dist.bench.measure import assemble_unwritten
from lora_dist.data.batch import Batch
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.gpu_check.outcome import Failed, Machine, Skipped
from lora_dist.gpu_check.small_run import run_flags
from lora_dist.model.lora.lora_layer import LoraLinear, draw_mask
from lora_dist.model.trained.parity import relative_difference, without_tf32
from lora_dist.processes.runtime import versions
from lora_dist.settings.bench import BenchSettings, contradictions
from lora_dist.settings.cli import parse
from lora_dist.training.problems.loss import Loss
from lora_dist.training.run import TrainingRun
from lora_dist.training.step import GradientAccumulator, Update, make_update

LAYER_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest error against float64, relative to the largest value."""
SPLIT_TOLERANCES = {"no": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
MOST_WAITS = 1
"""Largest number of waits for the device in an update, which reads its loss and its gradient norm at once."""
REDUCED_BYTES = 64 * 2**20


def hardware(machine: Machine) -> str:
    """Names versions, device and processes."""
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    if machine.has_gpu:
        properties = torch.cuda.get_device_properties(machine.accelerator.device)
        device = (
            f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability "
            f"{properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
        )
    else:
        device = f"no GPU, {platform.machine()}"
    return f"{device}; processes: {machine.accelerator.num_processes}; {found}"


def lora_layer(machine: Machine) -> str:
    """Compares the LoRA layer and its gradients with a computation in float64 that has the same dropout mask."""
    worst: dict[str, float] = {}
    for dtype, tolerance in LAYER_TOLERANCES.items():
        for rate in (0.0, 0.25):
            error = _layer_error(machine.accelerator.device, dtype, rate)
            worst[str(dtype).removeprefix("torch.")] = max(worst.get(str(dtype).removeprefix("torch."), 0), error)
            if not error <= tolerance:
                raise Failed(f"{dtype}, dropout {rate}: error {error:.1e} against float64, more than {tolerance:.0e}")
    return "error against float64: " + ", ".join(f"{name} {error:.1e}" for name, error in worst.items())


def _layer_error(device: torch.device, dtype: torch.dtype, rate: float) -> float:
    """Largest relative error of the output and of the gradients of input, A and B."""
    torch.manual_seed(0)
    shapes = {"x": (3, 40, 64), "weight": (48, 64), "bias": (48,), "down": (8, 64), "up": (48, 8)}
    given = {name: (torch.randn(shape) / 4).to(device, dtype) for name, shape in shapes.items()}
    trained = ("x", "down", "up")

    def outputs(compute: Any, tensors: dict[str, Tensor]) -> list[Tensor]:
        leaves = {name: tensor.detach().requires_grad_(name in trained) for name, tensor in tensors.items()}
        output = compute(leaves)
        weights = torch.linspace(-1, 1, output.numel(), device=device, dtype=output.dtype).view_as(output)
        (output * weights).sum().backward()
        return [output.detach(), *(leaves[name].grad for name in trained if leaves[name].grad is not None)]

    torch.manual_seed(1)
    kept, keep = draw_mask(given["x"].reshape(-1, 64), rate)
    mask = torch.ones_like(given["x"]) if kept is None else kept.to(dtype).view_as(given["x"])

    def reference(one: dict[str, Tensor]) -> Tensor:
        dropped = one["x"] * mask.double() / keep
        return one["x"] @ one["weight"].T + one["bias"] + 2.0 * dropped @ one["down"].T @ one["up"].T

    def layer(one: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(1)
        return LoraLinear.apply(one["x"], one["weight"], one["bias"], one["down"], one["up"], 2.0, rate)

    expected = outputs(reference, {name: tensor.double() for name, tensor in given.items()})
    with without_tf32():
        found = outputs(layer, given)
    assert len(found) == len(expected) == 1 + len(trained)
    return max(relative_difference(one.double(), other) for one, other in zip(found, expected, strict=True))


def model_input(machine: Machine) -> str:
    """Compares the input that the GPU makes of 8-bit pixels with that of the CPU."""
    machine.require_gpu()
    run = _assembled(machine)
    pixels = torch.randint(256, (8, 3, run.images.transforms.height, run.images.transforms.width), dtype=torch.uint8)
    transforms: ImageTransforms = run.images.transforms
    difference = relative_difference(
        transforms.finished(pixels.to(machine.accelerator.device)).cpu(), transforms.finished(pixels)
    )
    if not difference <= 1e-6:
        raise Failed(f"the GPU's input differs by {difference:.1e} of the largest value")
    return f"differs by {difference:.1e}"


def splits(machine: Machine) -> str:
    """Compares loss and gradient norm of an update of 8 samples per process, in micro-batches of 8, 4 and 2."""
    run, tolerance = _assembled(machine), SPLIT_TOLERANCES[machine.accelerator.mixed_precision]
    found = {size: _update(run, _micro_batches(run, size)) for size in (8, 4, 2)}
    for size, update in found.items():
        for name in ("loss", "grad_norm"):
            value, expected = getattr(update, name), getattr(found[8], name)
            if not abs(value - expected) <= tolerance * abs(expected):
                raise Failed(f"{name} in micro-batches of {size} is {value:.6g}, and in one of 8 {expected:.6g}")
    return f"loss {found[8].loss:.6g}, gradient norm {found[8].grad_norm:.6g} in each"


def waits(machine: Machine) -> str:
    """Counts the operations that wait for the device: few in an update, however many micro-batches it has."""
    machine.require_gpu()
    machine.require_one_process()
    run = _assembled(machine)
    counted = {size: _count_waits(run, _micro_batches(run, size)) for size in (8, 2)}
    in_update, in_four = counted[8], counted[2]
    said = f"{in_update} in an update of one micro-batch, {in_four} in one of four"
    if in_four > in_update or in_update > MOST_WAITS:
        raise Failed(said)
    return said


def _count_waits(run: TrainingRun, micro_batches: list[Batch]) -> int:
    _update(run, micro_batches)  # The first update allocates memory.
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            _update(run, micro_batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in caught)


def bandwidth(machine: Machine) -> str:
    """Measures the all-reduce between the processes, and checks its sum."""
    accelerator = machine.accelerator
    if accelerator.num_processes == 1:
        raise Skipped("needs several processes: accelerate launch --config_file … -m lora_dist.gpu_check")
    seconds = []
    for _ in range(6):
        numbers = torch.ones(REDUCED_BYTES // 4, device=accelerator.device)
        start = time.perf_counter()
        all_reduce(numbers)
        total = float(numbers[-1])
        seconds.append(time.perf_counter() - start)
        if total != accelerator.num_processes:
            raise Failed(f"the sum of ones over {accelerator.num_processes} processes is {total:g}")
    speed = 2 * (1 - 1 / accelerator.num_processes) * REDUCED_BYTES / statistics.median(seconds[1:])
    return f"{speed / 1e9:.3g} GB/s for {REDUCED_BYTES // 2**20} MiB over {accelerator.num_processes} processes"


def _assembled(machine: Machine) -> TrainingRun:
    """A run on the packaged base without dropout, with 8 samples per process in an update."""
    if machine.directory not in _runs:
        # No workers are needed: a sample depends on its seed alone.
        flags = run_flags(machine.directory, lora_dropout=0, dataloader_num_workers=0, mixed_precision="auto")
        settings = parse(
            BenchSettings, flags, prog="lora_dist.gpu_check", description="", contradictions=contradictions
        )
        _runs[machine.directory] = assemble_unwritten(settings, machine.accelerator, machine.directory / "unwritten")
    return _runs[machine.directory]


_runs: dict[Any, TrainingRun] = {}
"""The run of each directory, and so of each process. It is kept, because DeepSpeed prepares a model only once."""


def _micro_batches(run: TrainingRun, size: int) -> list[Batch]:
    """The first samples of this process, on its device."""
    samples = next(run.plan.micro_batches(0))
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    device = run.engine.accelerator.device
    return [run.images.finished(run.images.prepared(part).to(device)) for part in parts]


def _update(run: TrainingRun, micro_batches: list[Batch]) -> Update:
    """An update at a learning rate of 0, without clipping."""
    run.engine.model.train()
    with without_tf32():
        gradient = GradientAccumulator(
            run.engine,
            micro_batch_count=len(micro_batches),
            total_weight=run.plan.samples_in(0),
            learning_rate=0.0,
            loss=Loss(),
            dropout_seed=(0,),
        )
        return make_update(gradient, iter(micro_batches), 0)
