"""What each engine keeps in memory and sends in an update, for LoRA on ViT-B and ViT-L: a row of CSV a launch.

    accelerate launch --config_file accelerate_configs/zero3_cpu.yaml tests/benchmarks/engine_costs.py vit_l

Weights are random and in fp32; sizes do not depend on either. Memory is what stays between two updates: weights,
gradients and moments, not activations. Traffic is read from the loopback interface's counter, so nothing else may talk
over it; `make engine-costs`, which runs every launch file, sees to that.
"""

import gc
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from result_files import add_rows
from transformers import ViTConfig, ViTForImageClassification

from lora_dist.data.batch import Batch
from lora_dist.engines.engine import Engine, engine_name, make_engine
from lora_dist.model.lora.injection import inject
from lora_dist.model.lora.trainable import set_training
from lora_dist.processes.runtime import launch
from lora_dist.settings.train import LoraSettings, OptimizationSettings
from lora_dist.training.optimizer import make_optimizer
from lora_dist.training.problems.loss import Loss
from lora_dist.training.progress import Progress
from lora_dist.training.saving.checkpointer import Checkpointer
from lora_dist.training.step import GradientAccumulator, make_update

SHAPES: dict[str, dict[str, Any]] = {
    "vit_b": {},
    "vit_l": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
IMAGE_SIZE = 64
"""Small, because neither figure depends on the number of tokens."""
CLASSES = 101
UPDATES = 4


def main(shape: str) -> None:
    """Measures the engine of this launch and adds a row to `results/engine_costs.csv`."""
    accelerator = launch("auto")
    torch.manual_seed(0)
    config = ViTConfig(**SHAPES[shape] | {"image_size": IMAGE_SIZE, "num_labels": CLASSES})
    model = inject(ViTForImageClassification(config), LoraSettings(), ["classifier"])
    settings = OptimizationSettings(per_device_train_batch_size=2, gradient_accumulation_steps=1)
    engine = make_engine(accelerator, model, make_optimizer(model, settings, 1.0, []), settings)
    set_training(engine.model)
    del model
    _update(engine, 0)
    accelerator.wait_for_everyone()
    before, seconds = _loopback_bytes(), []
    for step in range(1, UPDATES + 1):
        start = time.perf_counter()
        _update(engine, step)
        seconds.append(time.perf_counter() - start)
    sent = (_loopback_bytes() - before) / UPDATES / accelerator.num_processes
    memory = _tensor_bytes()
    with tempfile.TemporaryDirectory() as directory:
        accelerator.wait_for_everyone()
        start = time.perf_counter()
        Checkpointer(Path(directory), engine, {}, keep=1).save(Progress(step=1))
        saving = time.perf_counter() - start
        size = sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())
    if accelerator.is_main_process:
        row = {
            "model": shape,
            "engine": engine_name(accelerator),
            "processes": accelerator.num_processes,
            "memory_mb_a_process": round(memory / 1e6, 1),
            "sent_mb_an_update_a_process": round(sent / 1e6, 1),
            "update_seconds": round(median(seconds), 2),
            "saving_seconds": round(saving, 3),
            "checkpoint_mb": round(size / 1e6, 2),
            "torch": torch.__version__,
        }
        print(json.dumps(row))
        add_rows("engine_costs.csv", [row])
    accelerator.end_training()


def _update(engine: Engine, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    batch = Batch(
        pixel_values=torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        labels=torch.randint(CLASSES, (2,), generator=generator),
        weights=torch.ones(2),
        indices=torch.arange(2),
    )
    gradient = GradientAccumulator(
        engine,
        micro_batch_count=1,
        total_weight=2 * engine.accelerator.num_processes,
        learning_rate=1e-3,
        loss=Loss(),
        dropout_seed=(0, step),
    )
    make_update(gradient, iter([batch]), max_grad_norm=1.0)


def _tensor_bytes() -> int:
    """Bytes of all tensors of this process; what shares memory counts once."""
    gc.collect()
    warnings.simplefilter("ignore")  # some things of torch complain when looked at
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    local = [getattr(tensor, "_local_tensor", tensor) for tensor in [*tensors, *gradients]]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}
    return sum(storages.values())


def _loopback_bytes() -> int:
    """Bytes that the loopback interface has carried."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


if __name__ == "__main__":
    main(sys.argv[1])
