"""The pooled features of images: the inputs of the last layer of a classifier."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.errors import UserError
from lora_dist.model.base.head import class_dimensions
from lora_dist.model.lora.adapters import base_of

_WRAPPERS = re.compile(r"\.(modules_to_save\.[^.]+|original_module|base_layer)(?=\.|$)")
"""Parts that PEFT inserts into the name of a module that it wraps."""


class PooledFeatures:
    """Keeps the input of the last layer in each forward pass, while it is entered as a context."""

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: a `transformers` classifier, with or without adapters.

        Raises:
            UserError: the model has no layer that follows the number of classes.
        """
        base = base_of(model)
        last = {name.rpartition(".")[0] for name in class_dimensions(base.config, type(base))}
        self._layers = [
            (plain, module)
            for plain, module in ((_WRAPPERS.sub("", name), module) for name, module in base.named_modules())
            if plain in last
        ]
        if not self._layers:
            raise UserError(
                f"{type(base).__name__} has no embeddings: none of its layers follows the number of classes"
            )
        self._inputs: dict[str, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "PooledFeatures":
        for name, layer in self._layers:
            self._hooks.append(layer.register_forward_pre_hook(self._keep(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str) -> Any:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._inputs[name] = inputs[0]

        return keep

    def last(self) -> Tensor:
        """Returns the features [B, C] of the last forward pass in fp32.

        Of two heads, as of DeiT's, it is the mean; where their widths differ, as CrossViT's, both one after the other.
        """
        features = [inputs.float() for inputs in self._inputs.values()]
        # [B, C, H, W] or [B, N, C] where the last layer comes before pooling.
        pooled = [x.mean(dim=(2, 3)) if x.dim() == 4 else x.mean(dim=1) if x.dim() == 3 else x for x in features]
        if len({x.shape for x in pooled}) > 1:
            return torch.cat(pooled, dim=-1)
        return torch.stack(pooled).mean(dim=0)
