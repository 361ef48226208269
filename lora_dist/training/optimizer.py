"""The optimizer, with parameter groups for weight decay, LoRA+, the head's learning rate and layer decay."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lora_dist.model.lora.parameter_names import is_head, is_lora_b, plain_parameter
from lora_dist.settings.train import OptimizationSettings


def make_optimizer(
    model: nn.Module,
    settings: OptimizationSettings,
    lora_b_ratio: float,
    heads: Sequence[str],
    steps_from_head: Mapping[str, int] | None = None,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Returns AdamW or SGD on every trainable parameter.

    The learning rate of a group relative to the schedule's is its entry `lr_ratio`.

    Args:
        model: before it is prepared.
        settings: of the optimizer; the learning rate is set anew for each update.
        lora_b_ratio: learning rate of the B matrices relative to the rest (LoRA+, https://arxiv.org/abs/2402.12354).
        heads: names of the head's modules, which train with `head_learning_rate`.
        steps_from_head: of each parameter of the base (see `depth.steps_from_head`), for `layer_decay`.
        fused: update all parameters in one kernel; see `engine.fuses`.
    """
    head_ratio = (settings.head_learning_rate or settings.learning_rate) / settings.learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            ratio = lora_b_ratio if is_lora_b(name) else head_ratio if is_head(name, heads) else 1.0
            if steps_from_head is not None:
                ratio *= settings.layer_decay ** steps_from_head[plain_parameter(name)]
            groups.setdefault((decay, ratio), []).append(parameter)
    parameters = [
        {"params": params, "weight_decay": decay, "lr_ratio": ratio} for (decay, ratio), params in groups.items()
    ]
    if settings.optim == "sgd":
        return torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=settings.momentum, fused=fused or None)
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=fused or None,
    )
