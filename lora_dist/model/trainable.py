"""Which tensors of a model are trained: chosen, counted, read and put back."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.errors import UserError
from lora_dist.model import adapters
from lora_dist.model.backbone import Base
from lora_dist.settings.train import LoraSettings, ModelSettings


def make_trainable(base: Base, settings: ModelSettings, lora: LoraSettings) -> nn.Module:
    """The model as it trains: with LoRA, with a new head on a frozen backbone, or whole.

    Raises:
        UserError: the model cannot be adapted so, or cannot recompute its activations.
    """
    model = base.model
    if settings.tuning == "lora":
        model = adapters.inject(model, lora, base.heads)
    elif settings.tuning == "head":
        model = adapters.inject_head_only(model, base.heads)
    else:
        model.requires_grad_(True)
    if settings.gradient_checkpointing:
        _checkpoint_gradients(base.model)
    freeze_unreached(model, base)
    if settings.torch_compile:
        model.compile()
    return model


def _checkpoint_gradients(model: Any) -> None:
    # After LoRA is in: PEFT would hook the embeddings for the sake of reentrant checkpoints, and breaks on Swin's.
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"--gradient_checkpointing: {error} Train without it, with smaller batches.") from error


def freeze_unreached(model: nn.Module, base: Base) -> None:
    """Freezes parameters that the loss does not reach, such as a mask token: under DDP they would stop the run."""
    size = base.processor(_blank(), return_tensors="pt")["pixel_values"]
    model.eval()
    model(pixel_values=size).logits.float().sum().backward()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.requires_grad_(False)
        parameter.grad = None


def _blank() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 64), (127, 127, 127))


def set_training(model: nn.Module) -> None:
    """Training mode, except for batch norms that do not train: their statistics belong to the frozen base."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not _trains(module):
            module.eval()


def _trains(module: nn.Module) -> bool:
    """Whether a module's own parameters train; of a batch norm, a bias alone does not make it."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.weight is not None and module.weight.requires_grad
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all that training changes: parameters, and the buffers that stand beside them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    for prefix, module in model.named_modules():
        if _trains(module):
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    yield f"{prefix}.{name}" if prefix else name, buffer


def load_trained(model: nn.Module, trained: Mapping[str, Tensor]) -> None:
    """Puts the tensors that training changed into a model, in place."""
    with torch.no_grad():
        for name, target in trained_tensors(model):
            target.copy_(trained[name])


def host_copy(tensor: Tensor) -> Tensor:
    """A copy on the host, in fp32 where it is a floating-point tensor."""
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None, copy=True).contiguous()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters; a head counts once, although PEFT keeps its first state as well."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if adapters.is_counted(name))
    return trainable, total
