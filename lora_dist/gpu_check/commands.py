"""Checks that run this package's commands: training in each precision, resume, predict, engines, benchmark."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.gpu_check.outcome import Failed, Machine, Skipped
from lora_dist.gpu_check.small_run import run_flags
from lora_dist.launch_files import LAUNCH_FILES
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.model.trained.parity import relative_difference, without_tf32
from lora_dist.processes.devices import cpu_has_bf16
from lora_dist.processes.runtime import half_precision

SECONDS = 120
"""Limit of a command."""
COMPILE_SECONDS = 480
"""Seconds added for DeepSpeed, which compiles its extensions at its first start."""
LINES = 15
IMAGES_FOR_GPU = 1024
"""Images of each class: enough for the warmup and two updates of 512 images."""
PREDICT_TOLERANCE = 1e-3
RESUME_TOLERANCE = 1e-2
"""Largest difference of trained weights, relative to the largest weight. Kernels may add in another order each time."""
OF_LAUNCHERS = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "MASTER_")
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")


def train_fp32(machine: Machine) -> str:
    """Trains four updates in fp32, with an evaluation and the final check of the written result."""
    machine.require_one_process()
    return _trained(machine, "no")


def train_bf16(machine: Machine) -> str:
    """The same in bf16."""
    machine.require_one_process()
    _require_bf16(machine)
    return _trained(machine, "bf16")


def train_fp16(machine: Machine) -> str:
    """Trains as `train_fp32`, but in fp16 with loss scaling."""
    machine.require_one_process()
    machine.require_gpu()
    return _trained(machine, "fp16")


def train_bf16_base(machine: Machine) -> str:
    """Trains as `train_fp32`, but with the frozen base in bf16, without autocast."""
    machine.require_one_process()
    _require_bf16(machine)
    return _described(_train(machine, "no", machine.directory / "bf16_base", "--base_dtype", "bfloat16"))


def repeat(machine: Machine) -> str:
    """Trains twice with --deterministic in half precision, and compares the adapters bit for bit."""
    machine.require_one_process()
    machine.require_gpu()
    outs = [machine.directory / "first", machine.directory / "again"]
    for out in outs:
        _train(machine, half_precision(), out, "--deterministic")
    first, again = (load_file(out / "adapter" / "adapter_model.safetensors") for out in outs)
    if others := [name for name, tensor in first.items() if not torch.equal(tensor, again[name])]:
        raise Failed(f"{len(others)} of {len(first)} tensors have other bits, such as {others[0]}")
    return f"the same bits in {len(first)} tensors"


def resume(machine: Machine) -> str:
    """Resumes the fp32 run from its second update, and compares the adapters."""
    machine.require_one_process()
    whole, out = machine.directory / "no", machine.directory / "resumed"
    checkpoint = Path("checkpoints") / "step-00000002"
    if not (whole / checkpoint).is_dir():
        raise Skipped("train_fp32 wrote no checkpoint")
    shutil.copytree(whole / checkpoint, out / checkpoint)
    _train(machine, "no", out, "--resume_from_checkpoint", "auto")
    expected, found = (load_file(root / "adapter" / "adapter_model.safetensors") for root in (whole, out))
    difference = max(relative_difference(found[name], tensor) for name, tensor in expected.items())
    if not difference <= RESUME_TOLERANCE:
        raise Failed(f"the resumed adapter differs by {difference:.1e} of the largest weight")
    return "the same bits" if difference == 0 else f"differs by {difference:.1e} of the largest weight"


def predict(machine: Machine) -> str:
    """Compares logits of the trained adapter on the GPU, in fp32, with those on the CPU."""
    machine.require_one_process()
    machine.require_gpu()
    adapter = machine.directory / "no" / "adapter"
    if not adapter.is_dir():
        raise Skipped("train_fp32 wrote no adapter")
    classifier = load_classifier(adapter)
    files = sorted((machine.directory / "photos" / "validation").rglob("*.png"))[:8]
    pixels = ImageTransforms(classifier.processor).batch([Image.open(file) for file in files])
    with torch.inference_mode(), without_tf32():
        expected = classifier.model(pixel_values=pixels).logits
        device = machine.accelerator.device
        found = classifier.model.to(device)(pixel_values=pixels.to(device)).logits.cpu()
    difference = relative_difference(found, expected)
    if not difference <= PREDICT_TOLERANCE:
        raise Failed(f"logits differ by {difference:.1e} of the largest")
    return f"logits differ by {difference:.1e} of the largest"


def ddp(machine: Machine) -> str:
    """Trains under DDP: on all GPUs with NCCL, or on two CPU processes with gloo."""
    return _launched(machine, "ddp")


def fsdp2(machine: Machine) -> str:
    """Trains under FSDP2, as `ddp`."""
    return _launched(machine, "fsdp2")


def zero1(machine: Machine) -> str:
    """Trains under DeepSpeed ZeRO-1, as `ddp`."""
    return _launched(machine, "zero1")


def zero3(machine: Machine) -> str:
    """Trains under DeepSpeed ZeRO-3, as `ddp`."""
    return _launched(machine, "zero3")


def benchmark(machine: Machine) -> str:
    """Runs `lora_dist.bench`: on a GPU a ViT-B/16 of random weights, on a CPU the packaged base. Returns a CSV row."""
    machine.require_one_process()
    settings: dict[str, Any] = {"updates": 2, "csv": machine.directory / "bench.csv"}
    if machine.has_gpu:
        settings |= {"model_name_or_path": _vit_b(machine.directory), "images": IMAGES_FOR_GPU}
        settings |= {"per_device_train_batch_size": 128, "gradient_accumulation_steps": 4}
        settings |= {"dataloader_num_workers": 4, "dataloader_prefetch_factor": 2}
    _run("lora_dist.bench", *run_flags(machine.directory / "benchmark", **settings))
    return "for tests/benchmarks/results/bench.csv:\n" + (machine.directory / "bench.csv").read_text(encoding="utf-8")


def _vit_b(directory: Path) -> Path:
    """Writes a ViT-B/16 with random weights."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    ViTForImageClassification(ViTConfig()).save_pretrained(directory / "vit_b")
    ViTImageProcessor().save_pretrained(directory / "vit_b")
    return directory / "vit_b"


def _require_bf16(machine: Machine) -> None:
    """Raises `Skipped` on a device that has no bf16."""
    if machine.has_gpu and half_precision() != "bf16":
        raise Skipped("this GPU has no bf16")
    if not machine.has_gpu and not cpu_has_bf16():
        raise Skipped("this CPU has no instructions for bf16")


def _trained(machine: Machine, precision: str) -> str:
    return _described(_train(machine, precision, machine.directory / precision))


def _described(results: dict[str, Any]) -> str:
    return f"loss {results['train_loss']:.4f}, {results['skipped_updates']} updates skipped, {results['device']}"


def _train(machine: Machine, precision: str, out: Path, *more: str) -> dict[str, Any]:
    """Trains in one process. Returns the results."""
    flags = run_flags(
        machine.directory,
        output_dir=out,
        max_train_steps=4,
        checkpointing_steps=2,
        eval_steps=2,
        save_total_limit=9,
        mixed_precision=precision,
    )
    _run("lora_dist.train", *flags, *more)
    return _results(out)


def _launched(machine: Machine, engine: str) -> str:
    """Trains two updates with a launch file, evaluating after each."""
    machine.require_one_process()
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        raise Skipped("deepspeed is not installed")
    name = {"ddp": "ddp_bf16"}.get(engine, engine) if machine.has_gpu else f"{engine}_cpu"
    processes = torch.cuda.device_count() if machine.has_gpu else 2
    if engine == "ddp" and processes == 1:
        raise Skipped("needs two GPUs")
    out = machine.directory / engine
    flags = run_flags(machine.directory, output_dir=out, max_train_steps=2, eval_steps=1)
    file = LAUNCH_FILES / "accelerate_configs" / f"{name}.yaml"
    launcher = ["--config_file", str(file), "--num_processes", str(processes), "--main_process_port", "0"]
    launcher += ["--mixed_precision", half_precision()]
    _run("accelerate.commands.launch", *launcher, "-m", "lora_dist.train", *flags, seconds=limit_of(engine))
    results = _results(out)
    if results["num_processes"] != processes:
        raise Failed(f"{results['num_processes']} processes trained instead of {processes}")
    return f"{processes} processes, {results['mixed_precision']}, loss {results['train_loss']:.4f}"


def limit_of(engine: str) -> float:
    """Returns the seconds that a launch with this engine may take."""
    return SECONDS + (COMPILE_SECONDS if engine.startswith("zero") else 0)


def _results(out: Path) -> dict[str, Any]:
    return json.loads((out / "all_results.json").read_text(encoding="utf-8"))


def _run(module: str, *arguments: str, seconds: float = SECONDS) -> None:
    """Runs a module in a new process, without the environment variables of the launcher of this one.

    Raises:
        Failed: with the last lines that it wrote, or because it took longer than `seconds`.
    """
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS) and name not in RANKS
    }
    command = [sys.executable, "-m", module, *arguments]
    offline = {"HF_HUB_OFFLINE": "1"}
    try:
        subprocess.run(command, env=inherited | offline, capture_output=True, text=True, timeout=seconds, check=True)
    except subprocess.CalledProcessError as error:
        said = "\n".join(error.stderr.splitlines()[-LINES:])
        raise Failed(f"{module} ended with {error.returncode}:\n{said}") from None
    except subprocess.TimeoutExpired:
        raise Failed(f"{module} did not end within {seconds:g} s") from None
