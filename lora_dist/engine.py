"""What the engine of a launch does its own way: one process or DDP, and DeepSpeed ZeRO, behind the same methods.

Everything that differs between engines stands here: accumulating and reducing gradients, clipping, stepping, and
getting whole tensors in and out where parameters or moments are sharded. Weights and moments come out the same from
every engine, so that a checkpoint of one goes into another.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from lora_dist.config import OptimizationSettings
from lora_dist.errors import UserError
from lora_dist.model import load_trained, trained_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """A model and its optimizer as one launch trains them. Every method is called on every process.

    Attributes:
        accelerator: of the launch.
        model: to call.
        bare: the same without the engine's wrapper.
    """

    accelerator: Accelerator
    model: nn.Module
    bare: nn.Module

    def begin_update(self, learning_rate: float) -> None:
        """Clears the gradient and sets the rate; a group's own is `learning_rate` times its `lr_ratio`."""

    def micro_batch(self, last: bool) -> Any:
        """A context for the forward and backward pass of one micro-batch; gradients are reduced after the `last`."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, summed over processes, to that of the update."""

    def step(self, max_grad_norm: float) -> float:
        """Clips the gradient (0: not at all) and makes the update. Returns the norm before clipping.

        Raises:
            ArithmeticError: the gradient is not finite, and not because of fp16 loss scaling; no update is made.
        """

    def was_skipped(self) -> bool:
        """Whether fp16 loss scaling left the last update out."""

    def trained(self) -> dict[str, Tensor]:
        """Whole tensors, on the host, of all that training changes."""

    def moments(self) -> dict[str, Tensor]:
        """Whole tensors, on the host, of the optimizer's state, as `<moment>/<parameter>`."""

    def load_trained(self, trained: Mapping[str, Tensor]) -> None:
        """Puts weights back."""

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Puts the optimizer's state back."""

    def scaler_state(self) -> dict[str, Any] | None:
        """State of fp16 loss scaling, for JSON."""

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Puts it back."""


def make_engine(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, settings: OptimizationSettings
) -> Engine:
    """Prepares a model and its optimizer for this launch."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return ZeroEngine(accelerator, model, optimizer, settings)
    return TorchEngine(accelerator, model, optimizer)


class TorchEngine:
    """One process, or DDP."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.accelerator = accelerator
        self.model, self._optimizer = accelerator.prepare(model, optimizer)
        self.bare = accelerator.unwrap_model(self.model)

    def begin_update(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
        self._optimizer.zero_grad()

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def backward(self, loss: Tensor) -> None:
        # DDP averages gradients over processes; here they are to be summed.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def step(self, max_grad_norm: float) -> float:
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        norm = float(self.accelerator.clip_grad_norm_(parameters, max_grad_norm or math.inf))
        if self.accelerator.scaler is None and not math.isfinite(norm):
            raise ArithmeticError
        self._optimizer.step()
        return norm

    def was_skipped(self) -> bool:
        return self.accelerator.optimizer_step_was_skipped

    def trained(self) -> dict[str, Tensor]:
        return {name: _host(tensor) for name, tensor in trained_tensors(self.bare)}

    def moments(self) -> dict[str, Tensor]:
        return {
            f"{moment}/{name}": _host(value)
            for name, parameter in self.bare.named_parameters()
            for moment, value in self._optimizer.state.get(parameter, {}).items()
        }

    def load_trained(self, trained: Mapping[str, Tensor]) -> None:
        load_trained(self.bare, trained)

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, value in moments.items():
            moment, _, name = key.partition("/")
            by_parameter.setdefault(name, {})[moment] = value
        for name, parameter in self.bare.named_parameters():
            if name in by_parameter:
                # AdamW keeps the count of steps on the host.
                self._optimizer.state[parameter] = {
                    moment: value if moment == "step" else value.to(parameter.device)
                    for moment, value in by_parameter[name].items()
                }

    def scaler_state(self) -> dict[str, Any] | None:
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(state)


class ZeroEngine:
    """DeepSpeed ZeRO-1, 2 and 3, with or without offloading."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: OptimizationSettings,
    ) -> None:
        """
        Raises:
            UserError: the DeepSpeed configuration and the settings contradict each other.
        """
        self.accelerator = accelerator
        self._ratios = [group.get("lr_ratio", 1.0) for group in optimizer.param_groups]
        configure_deepspeed(accelerator, settings)
        self.model, self._optimizer = accelerator.prepare(model, optimizer)
        self.bare = accelerator.unwrap_model(self.model)
        self._engine: Any = self.model

    def begin_update(self, learning_rate: float) -> None:
        for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = learning_rate * ratio

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self.accelerator.num_processes, scale_wrt_gas=False)

    def step(self, max_grad_norm: float) -> float:
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        # DeepSpeed reports a norm that it cannot compute as -1.
        if not self._engine.fp16_enabled() and (norm < 0 or not math.isfinite(norm)):
            raise ArithmeticError
        return norm

    def was_skipped(self) -> bool:
        return not self._engine.was_step_applied()

    def trained(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {
            name: _host(safe_get_full_fp32_param(tensor) if isinstance(tensor, nn.Parameter) else tensor)
            for name, tensor in trained_tensors(self.bare)
        }

    def moments(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = {float(state["step"]) for state in self._flat_states() if "step" in state}
        if not steps:
            return {}
        assert len(steps) == 1
        count = torch.tensor(steps.pop())
        found: dict[str, Tensor] = {}
        for name, tensor in trained_tensors(self.bare):
            if isinstance(tensor, nn.Parameter):
                for moment in MOMENTS:
                    found[f"{moment}/{name}"] = _host(safe_get_full_optimizer_state(tensor, moment))
                found[f"step/{name}"] = count.clone()
        return found

    def load_trained(self, trained: Mapping[str, Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        for name, target in trained_tensors(self.bare):
            value = trained[name].to(self.accelerator.device)
            # The weights that the model computes with, which are the whole tensor in ZeRO-1 and 2 …
            with torch.no_grad(), GatheredParameters([target], modifier_rank=0, enabled=hasattr(target, "ds_id")):
                target.copy_(value)
            # … and the optimizer's own fp32 copy of them.
            if isinstance(target, nn.Parameter):
                self._set_whole(target, value)

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        if not moments:
            return
        count = next(value for key, value in moments.items() if key.startswith("step/"))
        self._make_flat_states()
        for state in self._flat_states():
            state["step"] = count.clone()
        for name, target in trained_tensors(self.bare):
            if isinstance(target, nn.Parameter):
                for moment in MOMENTS:
                    value = moments[f"{moment}/{name}"].to(self.accelerator.device)
                    self._set_whole(target, value, moment)

    def scaler_state(self) -> dict[str, Any] | None:
        return {"cur_scale": self._engine.optimizer.cur_scale} if self._engine.fp16_enabled() else None

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        if state and "cur_scale" in state and self._engine.fp16_enabled():
            self._engine.optimizer.loss_scaler.cur_scale = state["cur_scale"]

    def _set_whole(self, parameter: Any, value: Tensor, moment: str | None = None) -> None:
        """Sets the optimizer's fp32 copy of a parameter, or one of its moments, from the whole tensor."""
        from deepspeed import utils

        if hasattr(parameter, "ds_id"):
            # ZeRO-3's own setter of whole tensors fails where the last process's part is padded.
            size = parameter.ds_tensor.numel()
            parts = value.new_zeros(self.accelerator.num_processes * size)
            parts[: value.numel()] = value.flatten()
            mine = parts.narrow(0, self.accelerator.process_index * size, size)
            if moment is None:
                utils.safe_set_local_fp32_param(parameter, mine)
            else:
                utils.safe_set_local_optimizer_state(parameter, mine, moment)
        elif moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)

    def _flat_states(self) -> list[dict[str, Tensor]]:
        return list(self._engine.optimizer.optimizer.state.values())

    def _make_flat_states(self) -> None:
        """AdamW's state of the flat partitions, which it makes at its first step otherwise."""
        zero = self._engine.optimizer
        sharded = hasattr(zero, "fp32_partitioned_groups_flat")
        for flat in zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups:
            if not zero.optimizer.state[flat]:
                zero.optimizer.state[flat] = {"step": torch.tensor(0.0)} | {
                    moment: torch.zeros_like(flat) for moment in MOMENTS
                }
        if not sharded:
            # ZeRO-1 and 2 link parameters to these states after their first step otherwise.
            zero._lazy_init_hp_params_optimizer_state()


def configure_deepspeed(accelerator: Accelerator, settings: OptimizationSettings) -> None:
    """Fills in what the DeepSpeed configuration leaves open, from the settings.

    Raises:
        UserError: it holds another value than the settings; both are named.
    """
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    wanted: dict[str, float] = {
        "train_micro_batch_size_per_gpu": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_clipping": settings.max_grad_norm,
        "train_batch_size": settings.per_device_train_batch_size
        * settings.gradient_accumulation_steps
        * accelerator.num_processes,
    }
    flags = {"train_micro_batch_size_per_gpu": "per_device_train_batch_size", "gradient_clipping": "max_grad_norm"}
    problems = [
        f"{name}: {config[name]}, but --{flags.get(name, name)} makes it {value}"
        for name, value in wanted.items()
        if config.get(name, "auto") not in ("auto", value)
    ]
    if problems:
        raise UserError("\n  ".join(["the DeepSpeed configuration contradicts the settings:", *problems]))
    config.update(wanted)
    accelerator.gradient_accumulation_steps = settings.gradient_accumulation_steps


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None, copy=True).contiguous()
