"""AdamW over what trains, with groups for weight decay and for LoRA+."""

import torch
from torch import nn

from lora_dist.model.adapters import is_lora_b
from lora_dist.settings.train import OptimizationSettings


def make_optimizer(model: nn.Module, settings: OptimizationSettings, lora_b_ratio: float) -> torch.optim.AdamW:
    """AdamW on every trainable parameter.

    Args:
        model: before it is prepared.
        settings: of the optimizer; the learning rate is set anew for each update.
        lora_b_ratio: learning rate of the B matrices relative to the rest (LoRA+, https://arxiv.org/abs/2402.12354);
            stands in the groups as `lr_ratio`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            ratio = lora_b_ratio if is_lora_b(name) else 1.0
            groups.setdefault((decay, ratio), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay, "lr_ratio": ratio} for (decay, ratio), params in groups.items()],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
    )
