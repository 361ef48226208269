"""Adds LoRA to an image classifier, and chooses the parameters that train."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from lora_dist.errors import UserError
from lora_dist.model.base.head import is_in
from lora_dist.model.lora import lora_layer
from lora_dist.model.lora.adapters import base_of
from lora_dist.model.lora.norms import norm_layers
from lora_dist.model.lora.targets import patterns, resolve_pattern, resolve_targets, selected, targets_in
from lora_dist.settings.train import LoraSettings


def inject(
    model: nn.Module,
    settings: LoraSettings,
    heads: Sequence[str],
    positions: Mapping[str, int] | None = None,
    blocks: Sequence[str] | None = None,
) -> PeftModel:
    """Freezes the model, adds LoRA to its target modules and makes the `heads` trainable in full.

    Args:
        positions: layers that the model calls, as in `resolve_targets`.
        blocks: modules to which LoRA is confined; None for the whole model.

    Raises:
        UserError: PEFT does not support these settings for the target modules.
    """
    _require_own_names(model)
    targets = resolve_targets(model, settings.lora_target_modules, heads, positions)
    if blocks is not None:
        targets = targets_in(targets, blocks, model)
    layers = selected(targets, model)
    whole = [*heads, *(norm_layers(model, heads) if settings.train_norms else ())]
    if settings.init_lora_weights in ("orthogonal", "pissa"):
        # PEFT would give convolutions orthogonal matrices of the wrong shape.
        for name in layers:
            if not isinstance(model.get_submodule(name), nn.Linear):
                raise UserError(
                    f"--init_lora_weights {settings.init_lora_weights} supports linear layers only, and {name} is none"
                )
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        rank_pattern=resolve_pattern(settings.lora_rank_pattern, layers, "lora_rank_pattern"),
        alpha_pattern=resolve_pattern(settings.lora_alpha_pattern, layers, "lora_alpha_pattern"),
        bias=settings.lora_bias,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True if settings.init_lora_weights == "default" else settings.init_lora_weights,
        modules_to_save=whole,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"{type(model).__name__} cannot be adapted with these LoRA settings: {error}") from error
    _freeze_others(adapted, whole)
    lora_layer.speed_up(adapted)
    return adapted


def inject_head_only(model: nn.Module, heads: Sequence[str]) -> PeftModel:
    """Freezes all but the heads; a linear probe is saved and loaded like a LoRA adapter."""
    _require_own_names(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=list(heads)))
    _freeze_others(adapted, heads)
    return adapted


def adapted_layers(model: nn.Module) -> str:
    """Describes the layers with LoRA, such as `24 layers: vit.layers.*.attention.q_proj, …`."""
    layers = [name for name, module in base_of(model).named_modules() if isinstance(module, LoraLayer)]
    kinds = patterns(layers)
    return f"{len(layers)} layers: {', '.join(kinds[:4])}{', …' if len(kinds) > 4 else ''}"


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Disables LoRA but keeps the backward pass as long as with it, to measure the cost of LoRA."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_hook(_with_gradient))
            stack.callback(layer.enable_adapters, True)
            layer.enable_adapters(False)
        yield


def _require_own_names(model: nn.Module) -> None:
    """Raises a `UserError` if a module has the name by which PEFT recognises its own layers, as in timm's DLA."""
    found = next((name for name, _ in model.named_modules() if name.rpartition(".")[2] == "base_layer"), None)
    if found:
        raise UserError(
            f"PEFT takes the module {found} of {type(model).__name__} for a part of its own layers, so LoRA cannot be "
            f"merged; train with --tuning full, or take another base model"
        )


def _freeze_others(model: PeftModel, heads: Sequence[str]) -> None:
    """Freezes modules that PEFT made trainable besides the heads and chosen norms: it compares the endings of names.

    PoolFormer's head `norm` selects the norms of all its blocks. Their unchanged copies stay in the adapter's file.

    Raises:
        UserError: such a module has LoRA, or PEFT did not find a head.
    """
    wrapped = {
        name: module for name, module in base_of(model).named_modules() if isinstance(module, ModulesToSaveWrapper)
    }
    if lacking := sorted(set(heads) - wrapped.keys()):
        raise UserError(f"PEFT cannot train {', '.join(lacking)} of {type(base_of(model)).__name__}")
    for name, module in wrapped.items():
        if not is_in(name, heads):
            if any(isinstance(layer, LoraLayer) for layer in module.modules()):
                raise UserError(f"PEFT cannot adapt {name}, whose name ends like that of a head ({', '.join(heads)})")
            module.requires_grad_(False)


def _with_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output
