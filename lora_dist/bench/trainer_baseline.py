"""The baseline of `--compare trainer`: the PEFT guide "Image classification using LoRA" on `transformers.Trainer`.

https://huggingface.co/docs/peft/task_guides/image_classification_lora, with the base model, data, LoRA shape, batch
size, precision, workers and rates of the run. Data loading and training are the guide's. Target modules and heads are
found as for the run, because the guide names the modules of a ViT in transformers 4.
"""

import os
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from torchvision import transforms
from transformers import Trainer, TrainerCallback, TrainingArguments

from lora_dist.bench.measure import warmup_updates
from lora_dist.data.loader import workers_of
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sources.load import load_data
from lora_dist.data.sources.split import Split
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import load_base_of_run
from lora_dist.model.lora.targets import resolve_targets
from lora_dist.model.lora.trainable import layers_called
from lora_dist.processes.devices import computes_on_cpu
from lora_dist.processes.runtime import choose_precision, engine_launched, half_precision
from lora_dist.settings.bench import BenchSettings
from lora_dist.settings.train import AugmentationSettings
from lora_dist.training.assembly import make_plan


class _Images(Dataset):
    """A split with the transforms of the guide."""

    def __init__(self, split: Split, transform: transforms.Compose) -> None:
        self._split = split
        self._transform = transform

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self._transform(self._split.image(index)), "label": int(self._split.labels[index])}


def _transform(processor: Any, augmentation: AugmentationSettings) -> transforms.Compose:
    target = ImageTransforms(processor)
    size = (target.height, target.width)
    last: list[Any] = [transforms.ToTensor()]
    if getattr(processor, "do_normalize", None):
        last.append(transforms.Normalize(mean=processor.image_mean, std=processor.image_std))
    if augmentation.augmentation == "none":
        return transforms.Compose([transforms.Resize(min(size)), transforms.CenterCrop(size), *last])
    crop = transforms.RandomResizedCrop(size, scale=(augmentation.crop_scale_min, 1.0))
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(augmentation.horizontal_flip), *last])


def _collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["label"] for example in examples]),
    }


class _Clock(TrainerCallback):
    """Records when each update ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.times.append(time.perf_counter())


def time_baseline(settings: BenchSettings, directory: Path) -> tuple[int, float, torch.device]:
    """Trains with the recipe of the guide. Called on every process.

    Args:
        directory: Output directory of `Trainer`.

    Returns:
        The samples of the measured updates over all processes, their seconds, and the device.

    Raises:
        UserError: The launch uses FSDP or DeepSpeed.
    """
    if engine_launched() != "NO":
        raise UserError(f"--compare trainer: {engine_launched()} is not supported; launch one process or DDP")
    arguments = _arguments(settings, directory)
    data = load_data(settings.data, settings.run.seed)
    assert isinstance(data.train, Split)
    base, lora = load_base_of_run(settings, data.labels), settings.lora
    model = get_peft_model(
        base.model,
        LoraConfig(
            r=lora.lora_r,
            lora_alpha=lora.lora_alpha,
            target_modules=resolve_targets(base.model, lora.lora_target_modules, base.heads, layers_called(base)),
            lora_dropout=lora.lora_dropout,
            bias=lora.lora_bias,
            modules_to_save=base.heads,
        ),
    )
    clock = _Clock()
    Trainer(
        model,
        arguments,
        train_dataset=_Images(data.train, _transform(base.processor, settings.augmentation)),
        processing_class=base.processor,
        data_collator=_collate,
        callbacks=[clock],
    ).train()
    plan = make_plan(settings, data.train, arguments.world_size, arguments.process_index)
    warmup = arguments.max_steps - settings.benchmark.updates
    samples = plan.samples_before(arguments.max_steps) - plan.samples_before(warmup)
    return samples, clock.times[-1] - clock.times[warmup - 1], arguments.device


def _arguments(settings: BenchSettings, directory: Path) -> TrainingArguments:
    optimization, on_cpu = settings.optimization, computes_on_cpu()
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = choose_precision(optimization.mixed_precision, launched, on_cpu, half_precision())
    workers = workers_of(settings.data, torch.device("cpu" if on_cpu else "cuda"))
    return TrainingArguments(
        str(directory),
        remove_unused_columns=False,
        eval_strategy="no",
        save_strategy="no",
        learning_rate=optimization.learning_rate,
        per_device_train_batch_size=optimization.per_device_train_batch_size,
        gradient_accumulation_steps=optimization.gradient_accumulation_steps,
        max_grad_norm=optimization.max_grad_norm,
        label_smoothing_factor=settings.augmentation.label_smoothing_factor,
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        tf32=None if on_cpu else optimization.tf32,
        max_steps=warmup_updates(workers, optimization.gradient_accumulation_steps) + settings.benchmark.updates,
        logging_steps=settings.run.logging_steps,
        dataloader_num_workers=workers,
        seed=settings.run.seed,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
    )
