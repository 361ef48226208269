"""Memory that `predict` and `train` take for a large base model, relative to its weights in fp32.

    PYTHONPATH=. python tests/benchmarks/base_memory.py

The base is a ViT-L with random weights. Each command runs on one image, or one update of one image a process, so that
activations are small. A process's memory is its proportional set size (PSS, in which a page that several processes or
mappings share counts once in all) and its resident set size (RSS), at their peaks, less those of a process that has
only imported the same modules. The rows are written to `results/base_memory.csv`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from PIL import Image
from result_files import add_rows
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessor

LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
IMPORTED = {
    "lora_dist.predict": "lora_dist.deployment.classify, lora_dist.deployment.export.merge, lora_dist.hub",
    "lora_dist.train": "lora_dist.training.assembly, lora_dist.training.loop, lora_dist.training.reporting.report",
}


class Memory(NamedTuple):
    """Proportional and resident set size, in bytes."""

    pss: int
    rss: int


def main() -> None:
    """Measures the commands and writes a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the checkpoint")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        weights = make_base(root / "base", getattr(torch, arguments.dtype))
        make_photos(root / "photos")
        train: list[Any] = [
            *(
                "--model_name_or_path",
                root / "base",
                "--train_dir",
                root / "photos",
                "--validation_dir",
                root / "photos",
            ),
            *("--per_device_train_batch_size", 1, "--per_device_eval_batch_size", 1, "--max_train_steps", 1),
            *("--gradient_accumulation_steps", 1, "--dataloader_num_workers", 0, "--mixed_precision", "no"),
        ]
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
        commands: dict[str, list[Any]] = {
            "train": [sys.executable, "-m", "lora_dist.train", *train, "--output_dir", root / "run"],
            "predict": [
                *(sys.executable, "-m", "lora_dist.predict", "--device", "cpu"),
                *("--adapter", root / "run/adapter", "--images", root / "photos/a/0.png"),
            ],
            "train, 2 processes": [
                *(*launch, "accelerate_configs/ddp_cpu.yaml", "-m", "lora_dist.train", *train),
                *("--output_dir", root / "run2"),
            ],
        }
        rows = [row for name, words in commands.items() for row in measure(name, words, weights, arguments.dtype)]
    add_rows("base_memory.csv", rows)


def make_base(directory: Path, dtype: torch.dtype) -> int:
    """Writes a ViT-L with random weights, and returns the bytes of its weights in fp32."""
    config = ViTConfig(**LARGE)
    config.architectures = ["ViTForImageClassification"]
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.empty(tensor.shape).normal_(0, 0.02, generator=generator).to(dtype)
        for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(directory, state_dict=state)
    ViTImageProcessor().save_pretrained(directory)
    return sum(4 * tensor.numel() for tensor in state.values())


def make_photos(directory: Path) -> None:
    """Writes two images of each of two classes."""
    for name in "ab":
        (directory / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (64, 64), (100 * number, 50, 200)).save(directory / name / f"{number}.png")


def measure(name: str, words: list[Any], weights: int, dtype: str) -> list[dict[str, Any]]:
    """Runs a command, and returns a row for each of its processes that load the base, and prints it."""
    module = next(word for word in words if word in IMPORTED)
    before = imported(module)
    rows = []
    for number, peak in enumerate(peaks([str(word) for word in words], module)):
        pss, rss = ((after - start) / weights for after, start in zip(peak, before, strict=True))
        rows.append(
            {
                "command": name,
                "process": number,
                "checkpoint": dtype,
                "weights_gb": f"{weights / 1e9:.2f}",
                "imports_pss_gb": f"{before.pss / 1e9:.2f}",
                "pss_of_weights": f"{pss:.2f}",
                "rss_of_weights": f"{rss:.2f}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def imported(module: str) -> Memory:
    """Memory of a process that has only imported what a command imports."""
    code = f"import {IMPORTED[module]}; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = memory_of(psutil.Process(process.pid))
        process.communicate(b"\n")
    return found


def peaks(words: list[str], module: str) -> list[Memory]:
    """The peaks of each process of a command that runs `module`, by sampling."""
    found: dict[int, Memory] = {}
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    if "accelerate.commands.launch" in one.cmdline() or module not in one.cmdline():
                        continue
                    now, before = memory_of(one), found.get(one.pid, Memory(0, 0))
                except psutil.Error:
                    continue
                found[one.pid] = Memory(max(now.pss, before.pss), max(now.rss, before.rss))
            time.sleep(0.05)
        assert process.stderr is not None
        if process.returncode:
            sys.exit(process.stderr.read().decode())
    return [peak for _, peak in sorted(found.items())]


def memory_of(process: psutil.Process) -> Memory:
    """The memory of a process now."""
    found = process.memory_full_info()
    return Memory(found.pss, found.rss)


if __name__ == "__main__":
    main()
