"""AdamW over what trains, with groups for weight decay, LoRA+ and the head's learning rate."""

from collections.abc import Sequence

import torch
from torch import nn

from lora_dist.model.adapters import is_head, is_lora_b
from lora_dist.settings.train import OptimizationSettings


def make_optimizer(
    model: nn.Module, settings: OptimizationSettings, lora_b_ratio: float, heads: Sequence[str], fused: bool = False
) -> torch.optim.AdamW:
    """AdamW on every trainable parameter. A group's learning rate relative to the schedule's stands in its `lr_ratio`.

    Args:
        model: before it is prepared.
        settings: of the optimizer; the learning rate is set anew for each update.
        lora_b_ratio: learning rate of the B matrices relative to the rest (LoRA+, https://arxiv.org/abs/2402.12354).
        heads: names of the head's modules, which train with `head_learning_rate`.
        fused: update all parameters in one kernel; see `engine.fuses`.
    """
    head_ratio = (settings.head_learning_rate or settings.learning_rate) / settings.learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            ratio = lora_b_ratio if is_lora_b(name) else head_ratio if is_head(name, heads) else 1.0
            groups.setdefault((decay, ratio), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay, "lr_ratio": ratio} for (decay, ratio), params in groups.items()],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=fused or None,
    )
