"""Resolves `--lora_target_modules`: auto, all-linear, or module names of transformers 4 or 5."""

from collections.abc import Sequence

from torch import nn

from lora_dist.errors import UserError
from lora_dist.model.head import is_in

SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("query", "q_proj"),
    ("key", "k_proj"),
    ("value", "v_proj"),
    ("attention.output.dense", "o_proj"),
    ("intermediate.dense", "fc1"),
    ("output.dense", "fc2"),
)
"""Names of the same projection in transformers 4 and 5, where most models were renamed (transformers#41693)."""

AUTO: tuple[tuple[str, ...], ...] = (("query", "value"), ("qkv",), ("pwconv1", "pwconv2"))
"""Targets of `auto`: the first group that the model has, else all its convolutions."""


def resolve_targets(model: nn.Module, names: Sequence[str], heads: Sequence[str]) -> list[str]:
    """Returns names for `LoraConfig.target_modules` that exist in this model.

    Args:
        model: the classifier, without adapters.
        names: suffixes of module names, `["auto"]` or `["all-linear"]`.
        heads: modules that are trained in full and get no LoRA.

    Raises:
        UserError: the model lacks one of the names.
    """
    adaptable: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and not is_in(name, heads)
    }
    if list(names) == ["all-linear"]:
        linear = [name for name, module in adaptable.items() if isinstance(module, nn.Linear)]
        if not linear:
            raise UserError(
                f"--lora_target_modules all-linear: {type(model).__name__} has no linear layer outside its head; "
                f"use auto"
            )
        return shortest(linear, model)
    if list(names) == ["auto"]:
        for group in AUTO:
            found = [match for name in group for match in _matches(name, adaptable)]
            if found:
                return shortest(found, model)
        return shortest([name for name, module in adaptable.items() if isinstance(module, nn.Conv2d)], model)
    resolved: list[str] = []
    for name in names:
        found = _matches(name, adaptable)
        if not found:
            exist = sorted({".".join(_last(module)) for module in adaptable})
            raise UserError(
                f"--lora_target_modules {name}: {type(model).__name__} has no such module. "
                f"It has {', '.join(exist)}; or use auto."
            )
        resolved += found
    return shortest(resolved, model)


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


def _matches(name: str, modules: dict[str, nn.Module]) -> list[str]:
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
