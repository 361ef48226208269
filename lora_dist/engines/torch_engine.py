"""Training with torch alone: one process, DDP or FSDP2."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_

from lora_dist.engines.batch_norm_statistics import RunningStatistics
from lora_dist.engines.half_precision import compute_in
from lora_dist.errors import NonFiniteGradientError
from lora_dist.model.lora import adapters
from lora_dist.model.lora.trainable import host_copy, load_trained, trained_tensors


class TorchEngine:
    """One process, DDP, or FSDP2, whose parameters and moments are `DTensor`s."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.accelerator = accelerator
        if accelerator.distributed_type == DistributedType.FSDP:
            compute_in(model, accelerator.mixed_precision)
            shard(accelerator, model, optimizer)
            self.model, self._optimizer = model, accelerator.prepare_optimizer(optimizer)
        else:
            leave_frozen_out(model)
            if accelerator.device.type == "cuda":
                order_for_convolutions(model)
            # On CPUs the device is cpu:0, to which torch copies what is on the device cpu.
            moves = accelerator.device.type != "cpu"
            self.model, self._optimizer = accelerator.prepare(model, optimizer, device_placement=[moves, None])
        self.unwrapped = accelerator.unwrap_model(self.model)
        self._statistics = RunningStatistics(self.unwrapped)
        self._skipped = self._unscaled = False

    def begin_update(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
        self._optimizer.zero_grad()
        self._statistics.keep()
        self._unscaled = False

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def backward(self, loss: Tensor) -> None:
        # DDP and FSDP average gradients over processes; here they are to be summed.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def clip_gradient(self, max_grad_norm: float) -> Tensor:
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        # Not accelerate's own clipping, which under FSDP2 unscales the gradients of every optimizer twice (1.15).
        self.accelerator.unscale_gradients(self._optimizer)
        self._unscaled = self.accelerator.scaler is not None
        norm = _whole(clip_grad_norm_(parameters, max_grad_norm or math.inf))
        return norm.float()[None].to(self.accelerator.device)

    def step(self, read: Sequence[float]) -> float:
        (norm,) = read
        finite = math.isfinite(norm)
        if self.accelerator.scaler is None and not finite:
            raise NonFiniteGradientError
        self._optimizer.step()
        # accelerate (1.15) does not notice that a fused optimizer has left the update out.
        self._skipped = not finite
        self._statistics.keep()
        return norm

    def drop_update(self) -> bool:
        self._optimizer.zero_grad()
        self._statistics.restore()
        scaler = self.accelerator.scaler
        if self._unscaled:
            # The scaler expects an update after it has unscaled the gradient. Its scale does not change.
            scaler.update(scaler.get_scale())
        return True

    def was_skipped(self) -> bool:
        return self._skipped

    def trainable_state(self) -> dict[str, Tensor]:
        self._reshard()
        return {name: host_copy(_whole(tensor)) for name, tensor in trained_tensors(self.unwrapped)}

    def optimizer_state(self) -> dict[str, Tensor]:
        self._reshard()
        states = {name: self._optimizer.state.get(parameter) for name, parameter in self.unwrapped.named_parameters()}
        states = {name: state for name, state in states.items() if state}
        assert len(states) == len(self._optimizer.state), "the optimizer holds other parameters than the model"
        return {
            f"{moment}/{name}": host_copy(_whole(value))
            for name, state in states.items()
            for moment, value in state.items()
        }

    def load_trainable_state(self, trained: Mapping[str, Tensor]) -> None:
        self._reshard()
        load_trained(
            self.unwrapped, {name: _placed(trained[name], like) for name, like in trained_tensors(self.unwrapped)}
        )
        self._statistics.keep()

    def load_optimizer_state(self, moments: Mapping[str, Tensor]) -> None:
        self._reshard()
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, value in moments.items():
            moment, _, name = key.partition("/")
            by_parameter.setdefault(name, {})[moment] = value
        fused = {
            parameter for group in self._optimizer.param_groups if group.get("fused") for parameter in group["params"]
        }
        for name, parameter in self.unwrapped.named_parameters():
            if name in by_parameter:
                # AdamW keeps the count of steps on the host, unless it is fused.
                counts_on = parameter.device if parameter in fused else torch.device("cpu")
                self._optimizer.state[parameter] = {
                    moment: value.to(counts_on) if moment == "step" else _placed(value, parameter)
                    for moment, value in by_parameter[name].items()
                }

    def _reshard(self) -> None:
        """Reshards the model, which after a forward pass without a backward pass may hold full parameters."""
        for module in self.unwrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def scaler_state(self) -> dict[str, Any] | None:
        scaler = self.accelerator.scaler
        if scaler is None:
            return None
        state = scaler.state_dict()
        return {"scale": state["scale"], "growth_tracker": state["_growth_tracker"]}

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None and state and state.keys() == {"scale", "growth_tracker"}:
            # Past its interval the scale would not grow any more.
            tracker = state["growth_tracker"] % scaler.get_growth_interval()
            scaler.load_state_dict({**scaler.state_dict(), "scale": state["scale"], "_growth_tracker": tracker})


def shard(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Shards every parameter over the processes, in place, and gives the optimizer the shards.

    `accelerator.prepare` would do so, but cuts the patch embedding twice, which fails (accelerate 1.15), and tells
    parameters apart by their address, which parts of no elements share.

    Args:
        accelerator: with the launch file's FSDP options.
        model: cut at the modules that `transformers` wants kept whole while they compute.
        optimizer: before its first step.
    """
    plugin = accelerator.state.fsdp_plugin
    options = {
        "mp_policy": precision(plugin),
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": offloading(plugin, accelerator.device),
    }
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [(group, [names[parameter] for parameter in group["params"]]) for group in optimizer.param_groups]
    for buffer in model.buffers():
        buffer.data = buffer.data.to(accelerator.device)
    kept_whole = set(getattr(model, "_no_split_modules", None) or ())
    for module in reversed(list(model.modules())):
        if type(module).__name__ in kept_whole:
            fully_shard(module, **options)
    fully_shard(model, **options)
    for group, members in groups:
        group["params"] = [model.get_parameter(name) for name in members]


def precision(plugin: FullyShardedDataParallelPlugin) -> MixedPrecisionPolicy:
    """The launch file's precision, but as under DDP, gradients are summed in fp32 and the output is not rounded."""
    policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    return dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def offloading(plugin: FullyShardedDataParallelPlugin, device: torch.device) -> OffloadPolicy:
    """The launch file's `fsdp_offload_params`; none on a CPU, where all weights are in the host's memory."""
    return OffloadPolicy() if device.type == "cpu" else plugin.cpu_offload


def _whole(tensor: Tensor) -> Tensor:
    """Returns the full tensor of a shard. Must be called on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _placed(whole: Tensor, like: Tensor) -> Tensor:
    """Moves a tensor to the device of another one, in its order of memory, and shards it in the same way."""
    if isinstance(like, DTensor):
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like, dtype=whole.dtype, requires_grad=False).copy_(whole)


def order_for_convolutions(model: nn.Module) -> None:
    """Puts the weights of a convolutional network into channels-last order, in place, in which cuDNN is faster.

    The output of convolutions then has this order. A transformer with a single convolution, for its patches, stays.
    """
    if sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1:
        model.to(memory_format=torch.channels_last)


def leave_frozen_out(model: nn.Module) -> None:
    """Keeps DDP from sending frozen parameters at the start and frozen buffers before each forward pass.

    Every process has read the same values.

    A write would copy the pages of the checkpoint that the processes of a node share. PiSSA computes its
    frozen weights, which may differ in the last bits.
    """
    if adapters.mutates_base(model):
        return
    trained = {name for name, _ in trained_tensors(model)}
    frozen = [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name not in trained]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
