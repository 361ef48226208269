"""The interface that every engine implements: one process, DDP, FSDP2, DeepSpeed ZeRO.

It covers everything that differs between engines: accumulating and reducing gradients, clipping, stepping,
and getting whole tensors in and out where parameters or moments are sharded. Every engine returns weights and moments
in the same form, so that another engine can load them.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed import broadcast

from lora_dist.engines.half_precision import DTYPES, compute_in
from lora_dist.engines.torch_engine import TorchEngine
from lora_dist.engines.zero_engine import ZeroEngine
from lora_dist.model.lora.trainable import trained_tensors
from lora_dist.settings.train import OptimizationSettings


class Engine(Protocol):
    """A model and its optimizer in one launch. Every method must be called on every process.

    Attributes:
        model: the wrapped model, to call.
        unwrapped: the model without the engine's wrapper.
    """

    accelerator: Accelerator
    model: nn.Module
    unwrapped: nn.Module

    def begin_update(self, learning_rate: float) -> None:
        """Clears the gradient and sets the rate; a group's own is `learning_rate` times its `lr_ratio`."""

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """A context for the forward and backward pass of one micro-batch; gradients are reduced after the `last`."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, summed over processes, to that of the update."""

    def clip_gradient(self, max_grad_norm: float) -> Tensor:
        """Clips the gradient (0: not at all). Returns float32 [N] on the device: what `step` needs on the host.

        Engines that clip within `step` return no numbers.
        """

    def step(self, read: Sequence[float]) -> float:
        """Makes the update with the clipped gradient. Returns the gradient's norm before clipping.

        Args:
            read: what `clip_gradient` returned, read from the device.

        Raises:
            NonFiniteGradientError: the gradient is not finite, and not because of fp16 loss scaling; no update is made.
        """

    def drop_update(self) -> bool:
        """Drops an update before its optimizer step: restores batch-norm statistics and clears the gradient.

        Returns:
            False where the gradient cannot be cleared, so that no other update can follow.
        """

    def was_skipped(self) -> bool:
        """Whether fp16 loss scaling skipped the last update."""

    def trainable_state(self) -> dict[str, Tensor]:
        """Returns the full trained tensors, on the CPU."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """Returns the full tensors of the optimizer state, on the CPU, as `<moment>/<parameter>`."""

    def load_trainable_state(self, trained: Mapping[str, Tensor]) -> None:
        """Loads trained tensors."""

    def load_optimizer_state(self, moments: Mapping[str, Tensor]) -> None:
        """Loads the optimizer state."""

    def scaler_state(self) -> dict[str, Any] | None:
        """Returns the state of fp16 loss scaling as JSON values: `scale` and `growth_tracker`; None without it."""

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Loads the state of fp16 loss scaling from any engine; ignores a state in another form."""


def broadcast_statistics(engine: Engine) -> None:
    """Broadcasts the trained buffers of rank 0, such as the running statistics of batch norms.

    These are saved and become part of the result. Only DDP broadcasts buffers by itself.
    """
    if engine.accelerator.num_processes > 1:
        for _, tensor in trained_tensors(engine.unwrapped):
            if not isinstance(tensor, nn.Parameter):
                broadcast(tensor, 0)


def engine_name(accelerator: Accelerator) -> str:
    """Returns the name of the engine: single, ddp, fsdp2, zero1, zero2 or zero3."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "single"


def fuses(accelerator: Accelerator) -> bool:
    """Whether this launch uses a fused optimizer, which makes an update in one kernel: on CUDA without DeepSpeed.

    On a CPU, a fused optimizer gives other bits than earlier releases. DeepSpeed restores optimizer state in its own
    way.
    """
    return accelerator.device.type == "cuda" and accelerator.distributed_type != DistributedType.DEEPSPEED


def on_device(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Moves a model to the device of this process. On a CPU it stays: torch would copy it from `cpu` to `cpu:0`."""
    return model if accelerator.device.type == "cpu" else model.to(accelerator.device)


def unsharded(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Makes a model compute on one process as in the engine of this launch: on its device and in its precision."""
    model, precision = on_device(model, accelerator), accelerator.mixed_precision
    if precision == "no":
        return model
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        compute_in(model, precision)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[precision])
        return model
    model.forward = torch.autocast(accelerator.device.type, DTYPES[precision])(model.forward)
    return model


def make_engine(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, settings: OptimizationSettings
) -> Engine:
    """Prepares a model and its optimizer for this launch."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return ZeroEngine(accelerator, model, optimizer, settings)
    return TorchEngine(accelerator, model, optimizer)
