"""Training with DeepSpeed ZeRO-1, 2 and 3, and full tensors in and out of its partitions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_dist.engines.batch_norm_statistics import RunningStatistics
from lora_dist.engines.half_precision import compute_in
from lora_dist.errors import NonFiniteGradientError, UserError
from lora_dist.model.lora.trainable import clear_cached, host_copy, trained_tensors
from lora_dist.settings.train import OptimizationSettings

DEFAULTS = {
    "reduce_bucket_size": 10_000_000,
    "stage3_max_live_parameters": 100_000_000,
    "stage3_max_reuse_distance": 100_000_000,
}
"""Numbers of elements, where the DeepSpeed configuration leaves them open. DeepSpeed's defaults suit language models: a
bucket of 2 GB for gradients of 3 MB, and a billion weights that may stay whole, more than most image models have."""


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
        self._moments = moments_of(optimizer)
        configure_deepspeed(accelerator, settings)
        compute_in(model, accelerator.mixed_precision)
        self.model, self._optimizer = accelerator.prepare(model, optimizer)
        self.unwrapped = accelerator.unwrap_model(self.model)
        self._engine: Any = self.model
        self._statistics = RunningStatistics(self.unwrapped)

    def begin_update(self, learning_rate: float) -> None:
        for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = learning_rate * ratio
        self._statistics.keep()

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self.accelerator.num_processes, scale_wrt_gas=False)

    def clip_gradient(self, max_grad_norm: float) -> Tensor:
        # DeepSpeed clips, by `gradient_clipping` of its configuration, and reads the norm as it makes the update.
        return torch.empty(0, device=self.accelerator.device)

    def step(self, read: Sequence[float]) -> float:
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        # DeepSpeed reports a norm that it cannot compute as -1.
        if not self._engine.fp16_enabled() and (norm < 0 or not math.isfinite(norm)):
            raise NonFiniteGradientError
        self._statistics.keep()
        return norm

    def drop_update(self) -> bool:
        self._statistics.restore()
        # A gradient that is not finite shows after the update; one that DeepSpeed has reduced stays in its buckets.
        return False

    def was_skipped(self) -> bool:
        return not self._engine.was_step_applied()

    def trainable_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {
            name: host_copy(safe_get_full_fp32_param(tensor) if isinstance(tensor, nn.Parameter) else tensor)
            for name, tensor in trained_tensors(self.unwrapped)
        }

    def optimizer_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        states = [state for state in self._flat_states() if state]
        if not states:
            return {}
        # SGD counts no steps.
        steps = {float(state["step"]) for state in states if "step" in state}
        assert len(steps) <= 1
        self._link_states()
        found: dict[str, Tensor] = {}
        for name, tensor in trained_tensors(self.unwrapped):
            if isinstance(tensor, nn.Parameter):
                for moment in self._moments:
                    found[f"{moment}/{name}"] = host_copy(safe_get_full_optimizer_state(tensor, moment))
                found |= {f"step/{name}": torch.tensor(count) for count in steps}
        return found

    def load_trainable_state(self, trained: Mapping[str, Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        for name, target in trained_tensors(self.unwrapped):
            value = trained[name].to(self.accelerator.device)
            # The weights that the model computes with, which are the whole tensor in ZeRO-1 and 2 …
            with torch.no_grad(), GatheredParameters([target], modifier_rank=0, enabled=hasattr(target, "ds_id")):
                target.copy_(value)
            # … and the optimizer's own fp32 copy of them.
            if isinstance(target, nn.Parameter):
                self._set_whole(target, value)
        clear_cached(self.unwrapped)
        self._statistics.keep()

    def load_optimizer_state(self, moments: Mapping[str, Tensor]) -> None:
        if not moments:
            return
        count = next((value for key, value in moments.items() if key.startswith("step/")), None)
        self._make_flat_states()
        if count is not None:
            for state in self._flat_states():
                state["step"] = count.clone()
        for name, target in trained_tensors(self.unwrapped):
            if isinstance(target, nn.Parameter):
                for moment in self._moments:
                    value = moments[f"{moment}/{name}"].to(self.accelerator.device)
                    self._set_whole(target, value, moment)

    def scaler_state(self) -> dict[str, Any] | None:
        return scaling_of(self._engine.optimizer.loss_scaler) if self._engine.fp16_enabled() else None

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        if state and self._engine.fp16_enabled():
            set_scaling(self._engine.optimizer.loss_scaler, state)

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
        """Creates the optimizer's state of the flat partitions, which otherwise appears at the first step."""
        zero = self._engine.optimizer
        sharded = hasattr(zero, "fp32_partitioned_groups_flat")
        for flat in zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups:
            if not zero.optimizer.state[flat]:
                zero.optimizer.state[flat] = {moment: torch.zeros_like(flat) for moment in self._moments}
        self._link_states()

    def _link_states(self) -> None:
        """Links the parameters of ZeRO-1 and 2 to their moments.

        DeepSpeed does so once, when the first group has made its first step and the other groups have no moments yet.
        """
        zero = self._engine.optimizer
        if hasattr(zero, "_hp_optimizer_states_linked"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()


def moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Returns the names of the tensors that AdamW or SGD keeps for each parameter."""
    if isinstance(optimizer, torch.optim.SGD):
        return ("momentum_buffer",) if optimizer.param_groups[0]["momentum"] else ()
    return ("exp_avg", "exp_avg_sq")


def scaling_of(scaler: Any) -> dict[str, Any]:
    """Returns the state of DeepSpeed's loss scaler in the form of `Engine.scaler_state`."""
    tracker = (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window if scaler.dynamic else 0
    return {"scale": float(scaler.cur_scale), "growth_tracker": tracker}


def set_scaling(scaler: Any, state: Mapping[str, Any]) -> None:
    """Loads that state; a scale that the DeepSpeed configuration fixes stays."""
    if scaler.dynamic and state.keys() == {"scale", "growth_tracker"}:
        scaler.cur_scale = state["scale"]
        scaler.cur_iter, scaler.last_overflow_iter = state["growth_tracker"], -1


def configure_deepspeed(accelerator: Accelerator, settings: OptimizationSettings) -> None:
    """Fills in values that the DeepSpeed configuration leaves open, from the settings.

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
    problems += [
        f"{name}: remove it, this comes from the settings" for name in ("optimizer", "scheduler") if name in config
    ]
    if plugin.zero_stage not in (1, 2, 3):
        problems.append(
            f"ZeRO stage {plugin.zero_stage}: set 1, 2 or 3, or distributed_type: MULTI_GPU without DeepSpeed"
        )
    if problems:
        raise UserError("\n  ".join(["the DeepSpeed configuration contradicts the settings:", *problems]))
    config.update(wanted)
    zero = config["zero_optimization"]
    for name, value in DEFAULTS.items():
        if zero.get(name, "auto") == "auto":
            zero[name] = value
    accelerator.gradient_accumulation_steps = settings.gradient_accumulation_steps
