"""The weighted sum of several adapters, as one adapter."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_dist.errors import UserError
from lora_dist.model.lora.adapter_io import split_lora_name
from lora_dist.model.lora.adapters import Adapter, rank_and_alpha

A, B = ".lora_A.weight", ".lora_B.weight"


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Returns an adapter whose update is exactly the weighted sum of the updates of several adapters.

    With s_i the scale of adapter i: sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, …] [A_1; A_2; …]. The rank is
    the sum of the ranks, the scale 1. Modules trained in full, such as heads, are averaged with the same weights.

    Args:
        adapters: read for the same base, with the same classes in the same order.
        weights: one for each adapter, with sum 1.

    Raises:
        UserError: an adapter uses DoRA, or the adapters train different modules in full.
    """
    for adapter in adapters:
        if adapter.config.use_dora:
            raise UserError(f"the adapter in {adapter.directory} uses DoRA, which has no weighted sum")
    ranks = [_largest_rank(adapter) for adapter in adapters]
    # Linear probes have no matrices.
    total = max(1, sum(ranks))
    state: dict[str, Tensor] = {}
    modules = sorted({target for adapter in adapters for target, lora in map(split_lora_name, adapter.state) if lora})
    for module in modules:
        like_a, like_b = next((a.state[module + A], a.state[module + B]) for a in adapters if module + A in a.state)
        blocks_a, blocks_b = [], []
        for adapter, weight, rank in zip(adapters, weights, ranks, strict=True):
            # Pads with zeros if this module has a lower rank or no LoRA in this adapter.
            block_a = like_a.new_zeros((rank, *like_a.shape[1:]), dtype=torch.float32)
            block_b = like_b.new_zeros((like_b.shape[0], rank, *like_b.shape[2:]), dtype=torch.float32)
            if module + A in adapter.state:
                found_a, found_b = adapter.state[module + A], adapter.state[module + B]
                block_a[: len(found_a)] = found_a
                block_b[:, : len(found_a)] = found_b.float() * (weight * _scale(adapter, module))
            blocks_a.append(block_a)
            blocks_b.append(block_b)
        state[module + A], state[module + B] = torch.cat(blocks_a, dim=0), torch.cat(blocks_b, dim=1)
    state |= _average(adapters, weights)
    first = adapters[0]
    config = replace(
        first.config,
        r=total,
        lora_alpha=total,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        target_modules=set(modules) if modules else first.config.target_modules,
        layers_to_transform=None,
        layers_pattern=None,
        exclude_modules=None,
    )
    return replace(first, config=config, state=state, names=None)


def _largest_rank(adapter: Adapter) -> int:
    return max((len(tensor) for name, tensor in adapter.state.items() if name.endswith(A)), default=0)


def _scale(adapter: Adapter, module: str) -> float:
    rank, alpha = rank_and_alpha(adapter.config, module)
    return alpha / (rank**0.5 if adapter.config.use_rslora else rank)


def _average(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """Averages tensors that are not LoRA matrices, in fp32; integer tensors are those of the first adapter."""
    wholes = [{n: tensor for n, tensor in adapter.state.items() if not split_lora_name(n)[1]} for adapter in adapters]
    averaged: dict[str, Tensor] = {}
    for adapter, whole in zip(adapters, wholes, strict=True):
        differing = sorted(whole.keys() ^ wholes[0].keys())
        differing += [
            name for name, tensor in whole.items() if name not in differing and tensor.shape != wholes[0][name].shape
        ]
        if differing:
            raise UserError(
                f"the adapters in {adapters[0].directory} and {adapter.directory} do not train the same modules in "
                f"full: {', '.join(differing[:5])}"
            )
    for name, tensor in wholes[0].items():
        if tensor.is_floating_point():
            terms = [whole[name].double() * weight for whole, weight in zip(wholes, weights, strict=True)]
            averaged[name] = torch.stack(terms).sum(dim=0).float()
        else:
            averaged[name] = tensor
    return averaged
