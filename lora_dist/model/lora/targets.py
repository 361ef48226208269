"""Resolves `--lora_target_modules`: auto, all-linear, or module names of transformers 4 or 5."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lora_dist.errors import UserError
from lora_dist.model.base.head import is_in

SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("query", "q_proj"),
    ("key", "k_proj"),
    ("value", "v_proj"),
    ("attention.output.dense", "o_proj"),
    ("intermediate.dense", "fc1"),
    ("output.dense", "fc2"),
)
"""Names of the same projection in transformers 4 and 5, where most models were renamed (transformers#41693)."""

AUTO: tuple[tuple[str, ...], ...] = (
    ("query", "value"),
    ("qkv",),
    ("pwconv1", "pwconv2"),
    ("projection_query", "projection_value"),
)
"""Targets of `auto`: the first group that the model has, if it is not too small, else all its linear layers or all its
convolutions, whichever hold more weights before pooling."""
logger = logging.getLogger(__name__)

SMALLEST_SHARE = 0.08
"""Smallest share of the backbone's weights that a group of `AUTO` may hold: an eighth in SegFormer, a sixth in ViT."""


def resolve_targets(
    model: nn.Module, names: Sequence[str], heads: Sequence[str], positions: Mapping[str, int] | None = None
) -> list[str]:
    """Returns names for `LoraConfig.target_modules` that exist in this model.

    Args:
        model: the classifier, without adapters.
        names: suffixes of module names, `["auto"]` or `["all-linear"]`.
        heads: modules that are trained in full and get no LoRA.
        positions: layers that the model calls (see `depth.layer_positions`); None for all. LoRA on others is in vain.

    Raises:
        UserError: the model lacks one of the names, or LoRA on it could not be merged.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not is_in(name, heads)
    }
    adaptable = {name: module for name, module in layers.items() if is_mergeable(module)}
    useful = {name: module for name, module in adaptable.items() if positions is None or name in positions}
    if list(names) == ["all-linear"]:
        linear = [name for name, module in useful.items() if isinstance(module, nn.Linear)]
        if not linear:
            raise UserError(
                f"--lora_target_modules all-linear: {type(model).__name__} has no linear layer outside its head; "
                f"use auto"
            )
        return shortest(linear, model)
    if list(names) == ["auto"]:
        if layers and not useful:
            raise UserError(
                f"{type(model).__name__} has no layer that LoRA can adapt and merge: {_why_not(layers)}. "
                f"Train with --tuning head or --tuning full"
            )
        return shortest(_automatic(useful, model, heads, positions), model)
    resolved: list[str] = []
    for name in names:
        found = _matches(name, adaptable)
        if not found and (others := _matches(name, layers)):
            raise UserError(
                f"--lora_target_modules {name}: LoRA cannot be merged there: "
                f"{_why_not({other: layers[other] for other in others})}. Use auto"
            )
        if not found:
            exist = sorted({".".join(_last(module)) for module in adaptable})
            raise UserError(
                f"--lora_target_modules {name}: {type(model).__name__} has no such module. "
                f"It has {', '.join(exist)}; or use auto."
            )
        resolved += found
    return shortest(resolved, model)


def targets_in(targets: Sequence[str], blocks: Sequence[str], model: nn.Module) -> list[str]:
    """Returns names for `LoraConfig.target_modules` that select those of `targets` inside these blocks.

    Raises:
        UserError: there is none.
    """
    found = [name for name in selected(targets, model) if is_in(name, blocks)]
    if not found:
        raise UserError(
            f"--layers_to_transform: no layer to adapt is inside {', '.join(blocks[:4])}; the others are "
            f"{', '.join(patterns(selected(targets, model))[:3])}"
        )
    return shortest(found, model)


def selected(targets: Sequence[str], model: nn.Module) -> list[str]:
    """Returns the full names of the modules that `LoraConfig.target_modules` selects."""
    return [name for name, _ in model.named_modules() if any(_ends(name, target) for target in targets)]


def resolve_pattern(pattern: Mapping[str, int], layers: Sequence[str], flag: str) -> dict[str, int]:
    """Returns a pattern for `LoraConfig` whose names fit the layers; those of the other generation are replaced.

    Args:
        pattern: by endings of names or regular expressions for them.
        layers: full names of the layers with LoRA.
        flag: the setting, for the error message.

    Raises:
        UserError: a name fits none of the layers.
    """
    resolved: dict[str, int] = {}
    for name, value in pattern.items():
        try:
            fitting = [key for key in _renamed(name) if any(_fits(key, layer) for layer in layers)]
        except re.error as error:
            raise UserError(f"--{flag} {name}: not a regular expression: {error}") from error
        if not fitting:
            shown = ", ".join(patterns(layers)[:4])
            raise UserError(f"--{flag} {name}: no layer with LoRA has such a name; they are {shown}")
        resolved[fitting[0]] = value
    return resolved


def pattern_value(pattern: Mapping[str, int], layer: str) -> int | None:
    """Returns the value of a layer in a pattern of `LoraConfig`: that of the first name that fits, as in PEFT."""
    return next((value for key, value in pattern.items() if _fits(key, layer)), None)


def fitting_pattern(pattern: Mapping[str, int], layers: Sequence[str]) -> dict[str, int]:
    """Returns a pattern without the names that count for none of the layers."""
    used = {next((key for key in pattern if _fits(key, layer)), None) for layer in layers}
    return {key: value for key, value in pattern.items() if key in used}


def _renamed(name: str) -> list[str]:
    """A name, and those with the same projection as the other generation of transformers calls it."""
    others = [name.removesuffix(old) + new for group in SYNONYMS for old in group if _ends(name, old) for new in group]
    return [name, *others]


def _fits(key: str, layer: str) -> bool:
    """Whether a name in a pattern of `LoraConfig` fits a layer, as PEFT decides it."""
    return re.match(rf"(.*\.)?({key})$", layer) is not None


def is_mergeable(layer: nn.Module) -> bool:
    """Whether PEFT's LoRA on a layer equals a change of its weight.

    It does not where the layer computes with something else than its weight and input (a `forward` of its own, a
    parametrisation), or is a convolution with groups, dilation or padding that PEFT's own convolutions do not have.
    """
    if is_parametrized(layer) or layer._forward_pre_hooks:
        return False
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        return plain and type(layer).forward is nn.Conv2d.forward
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward


def patterns(names: Iterable[str]) -> list[str]:
    """Names of modules with `*` for numbers, without duplicates."""
    return list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))


def _automatic(
    useful: Mapping[str, nn.Module], model: nn.Module, heads: Sequence[str], positions: Mapping[str, int] | None
) -> list[str]:
    backbone = sum(weight.numel() for name, weight in model.named_parameters() if not is_in(name, heads))
    for group in AUTO:
        found = [match for name in group for match in _matches(name, useful)]
        if found and _weights(useful[name] for name in found) >= SMALLEST_SHARE * backbone:
            return found
    kinds = [[name for name, layer in useful.items() if isinstance(layer, kind)] for kind in (nn.Linear, nn.Conv2d)]
    # Layers after pooling, such as squeeze-and-excitation, do not decide.
    before = {name: layer for name, layer in useful.items() if positions is None or positions[name] > 1}
    if not before:
        logger.warning(
            "LoRA can adapt only layers of %s that come after pooling (%s), and few features will change; "
            "compare with --tuning head and full",
            type(model).__name__,
            ", ".join(patterns(useful)[:3]),
        )
    counted = before or useful
    return max(kinds, key=lambda names: _weights(counted[name] for name in names if name in counted))


def _weights(layers: Iterable[nn.Module]) -> int:
    return sum(
        parameter.numel() for layer in layers for name, parameter in layer.named_parameters() if name == "weight"
    )


def _why_not(layers: Mapping[str, nn.Module]) -> str:
    """Returns the reason why LoRA cannot adapt these layers."""
    uncalled = [name for name, layer in layers.items() if is_mergeable(layer)]
    if uncalled:
        return f"it reads the weights of {', '.join(patterns(uncalled)[:3])} without calling these layers"
    kinds = sorted({type(layer).__name__ for layer in layers.values()})
    return f"{', '.join(kinds)} computes with other weights, padding, groups or dilation than plain layers"


def shortest(wanted: list[str], model: nn.Module) -> list[str]:
    """Returns the last components of `wanted` if they select no other module; else the full names.

    Raises:
        UserError: `wanted` is empty, or PEFT, which compares endings, would adapt other modules as well.
    """
    if not wanted:
        raise UserError(f"{type(model).__name__} has no linear or convolutional layer outside its head to adapt")
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in wanted})
    hit = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in suffixes}
    if hit == set(wanted):
        return suffixes
    others = [name for name, _ in model.named_modules() if name not in wanted and any(_ends(name, of) for of in wanted)]
    if others:
        raise UserError(f"PEFT cannot adapt {', '.join(wanted[:3])} without {', '.join(others[:3])}; add these")
    return sorted(set(wanted))


def _matches(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Full names of the modules that `name`, or else a synonym of it, selects."""
    synonyms = next((group for group in SYNONYMS if name in group), (name,))
    for candidate in (name, *synonyms):
        found = [module for module in modules if _ends(module, candidate)]
        if candidate != name:
            # An old name may be the ending of the old name of another projection.
            longer = [old for group in SYNONYMS for old in group if _ends(old, candidate) and old != candidate]
            found = [module for module in found if not any(_ends(module, old) for old in longer)]
        if found:
            return found
    return []


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _last(name: str) -> list[str]:
    """The last component of a module's name that is not a number, and those after it."""
    parts = name.split(".")
    start = next((index for index in reversed(range(len(parts))) if not parts[index].isdigit()), 0)
    return parts[start:]
