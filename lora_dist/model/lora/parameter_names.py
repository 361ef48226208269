"""Tests on names of parameters of an adapted model: B matrices, parts of a head, copies that PEFT adds."""

from collections.abc import Sequence

from lora_dist.model.base.head import is_in
from lora_dist.model.lora import adapter_io

DEFAULT = "default"
"""The name that PEFT gives an adapter by default."""


def is_counted(name: str) -> bool:
    """Whether a parameter counts as one of the model's; PEFT's untrained copy of each head does not."""
    return ".original_module." not in name


def is_lora_b(name: str) -> bool:
    """Whether a parameter is a B matrix, which LoRA+ trains at a higher learning rate."""
    return ".lora_B." in name


def is_head(name: str, heads: Sequence[str]) -> bool:
    """Whether a parameter, of an adapted model or not, belongs to one of the head's modules."""
    return is_in(name.removeprefix(adapter_io.PREFIX), heads)


def lora_layer_of(name: str) -> str | None:
    """Returns the layer that a parameter of LoRA adapts, or None for another parameter."""
    return name.removeprefix(adapter_io.PREFIX).partition(".lora_")[0] if ".lora_" in name else None


def plain_parameter(name: str) -> str:
    """Returns the name in the plain model of a trained parameter; for one of LoRA, that of the adapted weight."""
    layer = lora_layer_of(name)
    if layer is not None:
        return f"{layer}.weight"
    return adapter_io.plain_name(name.replace(f".modules_to_save.{DEFAULT}.", ".modules_to_save.")) or name
