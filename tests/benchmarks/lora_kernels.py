"""What LoRA's layers launch and keep in a micro-batch: operators that compute, and bytes saved for the backward pass.

    PYTHONPATH=. python tests/benchmarks/lora_kernels.py

A ViT-B with random weights at 224 px, one image, r = 16 on query and value, dropout 0.1, the head trained. Counts
operators that torch dispatches in a forward and backward pass, without views: on a GPU, about one kernel each. Saved
tensors that share memory count once, and weights not at all. Both are counted without LoRA, with PEFT's layers, with
this project's, and with these on a base in bf16; neither depends on the machine.
"""

import argparse
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
from lora_dist.model.adapters import inject, without_lora
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
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with Operators() as operators:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = cross_entropy(model(pixel_values=pixels).logits.float(), labels)
        loss.backward()
    model.zero_grad()
    return operators.count, sum(kept.values())


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--without_bf16", action="store_true", help="which takes minutes on a CPU")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = ViTConfig(image_size=args.image_size, num_hidden_layers=args.layers, num_labels=101)
    base = ViTForImageClassification(config)
    pixels, labels = torch.randn(1, 3, args.image_size, args.image_size), torch.zeros(1, dtype=torch.int64)
    for layers in ("without LoRA", "PEFT", "lora_dist", "lora_dist, base in bf16"):
        if "bf16" in layers and args.without_bf16:
            continue
        model = inject(copy.deepcopy(base), LoraSettings(), [HEAD])
        if layers in ("PEFT", "without LoRA"):
            for module in model.modules():
                module.__dict__.pop("forward", None)
        if "bf16" in layers:
            cast_base(model, [HEAD])
        with without_lora(model) if layers == "without LoRA" else nullcontext():
            count, kept = measure(model.train(), pixels, labels)
        print(f"| {layers} | {count:,} | {kept / 1e6:.1f} MB |", flush=True)


if __name__ == "__main__":
    main()
