"""Finds the classification head of a model."""

from collections.abc import Sequence
from typing import Any

from lora_dist.errors import UserError


def find_heads(model: Any, missing: Sequence[str] = ()) -> list[str]:
    """Names of the modules to train in full: all that is not of the backbone, and what the checkpoint lacked.

    Args:
        model: a `transformers` classifier.
        missing: parameters that the checkpoint did not have, such as the pooler of a masked-image model, or had in
            another shape. `transformers` makes them anew; left frozen they would be noise.
    """
    heads = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    # Shorter names come first, so that no head stands inside another one.
    for module in sorted({parameter.rpartition(".")[0] for parameter in missing}, key=lambda name: (len(name), name)):
        if module and not any(module == head or module.startswith(f"{head}.") for head in heads):
            heads.append(module)
    if not heads:
        raise UserError(f"{type(model).__name__} has no head beside its backbone {model.base_model_prefix!r}")
    return heads
