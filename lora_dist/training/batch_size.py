"""Finds the largest micro-batch that fits into memory on every process (`--auto_batch_size`)."""

import gc
import logging

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.engines.engine import on_device
from lora_dist.errors import UserError
from lora_dist.model.lora.trainable import set_training
from lora_dist.settings.train import OptimizationSettings

logger = logging.getLogger(__name__)


def fit_batch_size(
    accelerator: Accelerator, model: nn.Module, transforms: ImageTransforms, settings: OptimizationSettings
) -> OptimizationSettings:
    """Shrinks micro-batches until they fit, and raises accumulation to match.

    Each process tries a forward and a backward pass alone, with memory reserved for gradients and AdamW's moments. The
    process with the least free memory decides. An update has the same samples as before. Called on every process,
    before the engine is made.

    Args:
        model: trainable; moved to the device.
        transforms: say how large an image is.

    Raises:
        UserError: not even a single sample fits, or the engine shards the model, so that no process can try alone.
    """
    if accelerator.distributed_type == DistributedType.FSDP or _is_zero3(accelerator):
        raise UserError(
            "--auto_batch_size tries batches on each process alone, but under ZeRO-3 and FSDP2 none has the whole "
            "model: halve --per_device_train_batch_size and double --gradient_accumulation_steps by hand"
        )
    on_device(model, accelerator)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    sizes = _sizes(settings.per_device_train_batch_size, settings.gradient_accumulation_steps)
    own = next((size for size in sizes if _fits(accelerator, model, transforms, size)), 0)
    for buffer, before in buffers:
        buffer.data.copy_(before)
    size = min(gather_object([own]))
    if size == 0:
        raise UserError(
            f"not even a batch of one sample fits into the memory of {accelerator.device}: "
            f"try --gradient_checkpointing, a smaller model, or zero3 or fsdp2 on several devices"
        )
    if size == settings.per_device_train_batch_size:
        return settings
    accumulation = settings.per_device_train_batch_size * settings.gradient_accumulation_steps // size
    logger.warning(
        "batches of %d per process do not fit into memory: taking %d, and accumulating %d instead of %d",
        settings.per_device_train_batch_size,
        size,
        accumulation,
        settings.gradient_accumulation_steps,
    )
    return settings.model_copy(
        update={
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "per_device_eval_batch_size": min(size, settings.per_device_eval_batch_size),
        }
    )


def _sizes(batch: int, accumulation: int) -> list[int]:
    """Returns the sizes to try, each at most half of the previous one, that divide the same update."""
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append(next(size for size in range(sizes[-1] // 2, 0, -1) if batch * accumulation % size == 0))
    return sizes


def _fits(accelerator: Accelerator, model: nn.Module, transforms: ImageTransforms, size: int) -> bool:
    """Whether a forward and a backward pass over `size` samples fit into memory."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    set_training(model)
    try:
        # Two moments, and one more copy of the gradient, in which processes exchange it.
        held = torch.empty(3 * trainable, device=accelerator.device)
        pixels = torch.zeros(size, 3, transforms.height, transforms.width, device=accelerator.device)
        with accelerator.autocast():
            loss = model(pixel_values=pixels).logits.float().sum()
        loss.backward()
        del held, pixels, loss
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return False
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        gc.collect()
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _is_zero3(accelerator: Accelerator) -> bool:
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return plugin is not None and plugin.zero_stage == 3
