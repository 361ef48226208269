"""What LoRA's layers launch and keep in a micro-batch: operators that compute, and bytes saved for the backward pass.

    PYTHONPATH=. python tests/benchmarks/lora_kernels.py

A ViT-B at 224 px, one image, r = 16 on query and value, dropout 0.1, the head trained, on the meta device: nothing is
computed, and LoRA's layers take the way of a GPU. Counts the operators that torch dispatches in both passes,
without views: on a GPU, about one kernel each. Saved tensors that share memory count once, and weights not at all.
Attention is not fused on this device, which adds as much to each row.
"""

import copy
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTConfig, ViTForImageClassification

from lora_dist.engines.bf16_base import cast_base
from lora_dist.model.lora.injection import inject, without_lora
from lora_dist.settings.train import LoraSettings

HEAD = "classifier"
VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "expand",
    "detach",
    "select",
    "slice",
    "unsqueeze",
    "alias",
}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense"}


class Operators(TorchDispatchMode):
    """Counts operators that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name.removeprefix("aten::") not in VIEWS | ALLOCATIONS
        return func(*args, **(kwargs or {}))


def measure(model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[int, int]:
    """Operators of a forward and backward pass, and bytes kept between them."""
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with Operators() as operators:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = cross_entropy(model(pixel_values=pixels).logits.float(), labels)
        loss.backward()
    model.zero_grad()
    return operators.count, sum(kept.values())


def main() -> None:
    """Prints a table."""
    torch.is_autocast_enabled = lambda *_: False  # The meta device does not know it.
    config = ViTConfig()
    config.num_labels = 101
    with torch.device("meta"):
        pixels, labels = torch.empty(1, 3, 224, 224), torch.zeros(1, dtype=torch.int64)
        base = ViTForImageClassification(config)
    for in_bf16 in (False, True):
        for layers in ("without LoRA", "PEFT", "lora_dist"):
            with torch.device("meta"):
                model = inject(copy.deepcopy(base), LoraSettings(), [HEAD]).train()
            if layers != "lora_dist":
                for module in model.modules():
                    module.__dict__.pop("forward", None)
            if in_bf16:
                cast_base(model, [HEAD])
            with without_lora(model) if layers == "without LoRA" else nullcontext():
                count, kept = measure(model, pixels, labels)
            print(f"| {'bf16' if in_bf16 else 'fp32'} | {layers} | {count:,} | {kept / 1e6:.1f} MB |", flush=True)


if __name__ == "__main__":
    main()
