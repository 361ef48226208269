"""Chooses the trainable tensors of a model, and reads, counts and restores them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lora_dist.errors import UserError
from lora_dist.model.base.backbone import Base
from lora_dist.model.lora import adapters, injection, parameter_names
from lora_dist.model.lora.depth import choose_blocks, find_blocks, layer_positions, steps_from_head
from lora_dist.settings.train import LoraSettings, ModelSettings

logger = logging.getLogger(__name__)


def make_trainable(base: Base, settings: ModelSettings, lora: LoraSettings) -> nn.Module:
    """Sets up a base for training LoRA and the head, the head alone, or all weights; returns the model to train.

    Raises:
        UserError: the model does not support these settings.
    """
    model, blank = base.model, blank_image(base.processor)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{base.name} is a base model with an adapter beside it (adapter_config.json): merge it with "
            f"lora_dist.predict --adapter {base.name} --merge_to DIRECTORY, and train from there"
        )
    model.eval()
    if settings.tuning == "lora":
        blocks = None if lora.layers_to_transform is None else blocks_of(base, lora.layers_to_transform)
        model = injection.inject(model, lora, base.heads, layer_positions(model, blank), blocks)
    elif settings.tuning == "head":
        model = injection.inject_head_only(model, base.heads)
    else:
        model.requires_grad_(True)
    if settings.gradient_checkpointing:
        # Not before LoRA: PEFT would add hooks for reentrant checkpointing, and fails on Swin.
        try:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"--gradient_checkpointing: {error} Train without it, with smaller batches.") from error
    _freeze_unused(model, base, blank)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and _trains(module):
            module.forward = MethodType(_normalise, module)  # type: ignore[method-assign]
    if settings.torch_compile:
        from accelerate.utils import compile_regions_deepspeed

        # In place, so that names and hooks stay. A block is compiled once, however often the model repeats it.
        compile_regions_deepspeed(model)
    return model


def set_training(model: nn.Module) -> None:
    """Sets training mode, except for frozen norms with running statistics, which must not change."""
    model.train()
    for module in model.modules():
        if any(name.startswith("running_") for name in module._buffers) and not _trains(module):
            module.eval()


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields names and tensors that training changes: trainable parameters, and the buffers of their modules."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    for prefix, module in model.named_modules():
        if _trains(module):
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    yield f"{prefix}.{name}" if prefix else name, buffer


def load_trained(model: nn.Module, trained: Mapping[str, Tensor]) -> None:
    """Copies trained tensors into a model, in place."""
    with torch.no_grad():
        for name, target in trained_tensors(model):
            target.copy_(trained[name])
    clear_cached(model)


def clear_cached(model: nn.Module) -> None:
    """Drops what LeViT caches of its weights in evaluation mode, which would be stale after the weights change."""
    was_training = model.training
    set_training(model)
    if not was_training:
        model.eval()


def host_copy(tensor: Tensor) -> Tensor:
    """Copies a tensor to the CPU; floating-point tensors become fp32."""
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None, copy=True).contiguous()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Counts trainable and all parameters, without PEFT's untrained copies of the heads."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if parameter_names.is_counted(name))
    return trainable, total


def _normalise(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Normalises single values per channel, as in a last batch of one image, by the running statistics."""
    if not norm.training or x.numel() != x.shape[1]:
        return type(norm).forward(norm, x)
    norm.eval()
    try:
        return type(norm).forward(norm, x)
    finally:
        norm.train()


def layers_called(base: Base) -> dict[str, int]:
    """Returns the layers that a base model calls for an image, as `layer_positions`."""
    return layer_positions(base.model, blank_image(base.processor))


def blocks_of(base: Base, wanted: Sequence[int] | str) -> list[str]:
    """Returns the names of the blocks of a base that `layers_to_transform` names (see `choose_blocks`)."""
    found = find_blocks(base.model.eval(), base.heads, blank_image(base.processor))
    return choose_blocks(found, wanted)


def parameter_steps(base: Base) -> dict[str, int]:
    """Returns how many layers each parameter of a base, before LoRA, is from the head (see `steps_from_head`)."""
    return steps_from_head(base.model.eval(), base.heads, blank_image(base.processor))


def blank_image(processor: Any) -> Tensor:
    """One grey image as the model takes it, float32 [1, 3, H, W]."""
    return processor(Image.new("RGB", (64, 64), (127, 127, 127)), return_tensors="pt")["pixel_values"]


def _freeze_unused(model: nn.Module, base: Base, blank: Tensor) -> None:
    """Freezes parameters that get no gradient, such as a mask token: DDP would fail on them.

    Raises:
        UserError: the model does not run with LoRA, or no layer with LoRA contributes to its logits.
    """
    # Training mode drops what LeViT kept of its weights in an evaluation without gradients.
    model.train()
    model.eval()
    try:
        logits = model(pixel_values=blank).logits
    except AttributeError as error:
        # MobileNet reads `stride` off its convolutions.
        if not adapters.is_adapted(model):
            raise
        raise UserError(
            f"{type(base.model).__name__} does not run with LoRA: its code reads an attribute that PEFT's layers do "
            f"not have ({error}). Train with --tuning head or --tuning full"
        ) from error
    logits.float().sum().backward()
    used: set[str | None] = set()
    unused: set[str | None] = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (unused if parameter.grad is None else used).add(parameter_names.lora_layer_of(name))
            parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    layers = ", ".join(sorted(layer for layer in unused if layer)[:3])
    if layers and not used - {None}:
        raise UserError(
            f"LoRA on {layers} has no effect: {type(base.model).__name__} computes its logits without calling these "
            f"layers. Name others with --lora_target_modules, or train with --tuning head"
        )
    if layers:
        logger.warning(
            "%d layers with LoRA have no effect on the logits and do not train: %s", len(unused - {None}), layers
        )


def _trains(module: nn.Module) -> bool:
    """Whether a module's own parameters train; a batch norm with a trainable bias alone counts as frozen."""
    if isinstance(module, _BatchNorm):
        return module.weight is not None and module.weight.requires_grad
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))
