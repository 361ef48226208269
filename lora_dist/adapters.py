"""LoRA on an image classifier: find targets, inject, save, load strictly, merge. Only this module imports peft."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_dist.config import LoraSettings
from lora_dist.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"

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
"""What `auto` adapts: the first of these that the model has, else all its convolutions."""


def resolve_targets(model: nn.Module, names: Sequence[str], heads: Sequence[str]) -> list[str]:
    """Names for `LoraConfig.target_modules` that exist in this model.

    Args:
        model: the classifier, without adapters.
        names: suffixes of module names, in the names of transformers 4 or 5; or `["auto"]`, or `["all-linear"]`.
        heads: modules that train in full and take no adapter.

    Raises:
        UserError: a name that the model lacks, with the names that it has.
    """
    adaptable: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and not any(name == head or name.startswith(f"{head}.") for head in heads)
    }
    if list(names) == ["all-linear"]:
        linear = [name for name, module in adaptable.items() if isinstance(module, nn.Linear)]
        if not linear:
            raise UserError(
                f"--lora_target_modules all-linear: {type(model).__name__} has no linear layer outside its head; "
                f"use auto"
            )
        return _shortest(linear, model)
    if list(names) == ["auto"]:
        for group in AUTO:
            found = [match for name in group for match in _matches(name, adaptable)]
            if found:
                return _shortest(found, model)
        return _shortest([name for name, module in adaptable.items() if isinstance(module, nn.Conv2d)], model)
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
    return _shortest(resolved, model)


def _matches(name: str, modules: dict[str, nn.Module]) -> list[str]:
    """Full names of the modules that `name`, or else a synonym of it, stands for."""
    synonyms = next((group for group in SYNONYMS if name in group), (name,))
    for candidate in (name, *synonyms):
        found = [module for module in modules if _ends(module, candidate)]
        if candidate != name:
            # A new name means one projection; the old name that stands for it may end that of another one.
            longer = [old for group in SYNONYMS for old in group if _ends(old, candidate) and old != candidate]
            found = [module for module in found if not any(_ends(module, old) for old in longer)]
        if found:
            return found
    return []


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _last(name: str) -> list[str]:
    """The last part of a module's name that is no number, and what follows it."""
    parts = name.split(".")
    start = next((place for place in reversed(range(len(parts))) if not parts[place].isdigit()), 0)
    return parts[start:]


def _shortest(wanted: list[str], model: nn.Module) -> list[str]:
    """The last components of `wanted`, where these name nothing else in the model; else the full names."""
    if not wanted:
        raise UserError(f"{type(model).__name__} has no linear or convolutional layer outside its head to adapt")
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in wanted})
    hit = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in suffixes}
    return suffixes if hit == set(wanted) else sorted(set(wanted))


def inject(model: nn.Module, settings: LoraSettings, heads: Sequence[str]) -> PeftModel:
    """Freezes the model, adds LoRA to its target modules and lets the heads train in full.

    Args:
        model: the classifier.
        settings: of LoRA.
        heads: names of the modules to train in full.

    Raises:
        UserError: this kind of LoRA does not exist for the target modules.
    """
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=resolve_targets(model, settings.lora_target_modules, heads),
        bias=settings.lora_bias,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True if settings.init_lora_weights == "default" else settings.init_lora_weights,
        modules_to_save=list(heads),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"{type(model).__name__} cannot be adapted with these settings of LoRA: {error} "
            f"(--init_lora_weights pissa, for one, is for linear layers only)"
        ) from error


def inject_head_only(model: nn.Module, heads: Sequence[str]) -> PeftModel:
    """Freezes all but the heads, in the format of an adapter: a linear probe is saved and loaded like LoRA."""
    return get_peft_model(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=list(heads)))


def mutates_base(model: nn.Module) -> bool:
    """Whether the initialisation changed the base (PiSSA), so that saving has to convert back."""
    return isinstance(model, PeftModel) and getattr(model.peft_config["default"], "init_lora_weights", "") == "pissa"


def save_adapter(model: nn.Module, directory: Path, initial: Path | None = None) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        model: with its adapter.
        directory: is created.
        initial: the adapter as it was before training, where `mutates_base`; the result is then plain LoRA of
            twice the rank on the unchanged base.

    Raises:
        ValueError: a tensor is empty, as happens to parts of a sharded model (peft#2892).
    """
    assert isinstance(model, PeftModel)
    empty = [name for name, tensor in get_peft_model_state_dict(model).items() if tensor.numel() == 0]
    if empty:
        raise ValueError(f"empty tensors in the adapter: {', '.join(empty)}")
    model.save_pretrained(str(directory))
    if initial is not None:
        _make_plain(directory, initial)


def _make_plain(directory: Path, initial: Path) -> None:
    """Turns a saved adapter into LoRA on the unchanged base: B A - B0 A0 = [B, -B0] [A; A0].

    `save_pretrained` of PEFT would do it too, but it loses the heads, and all else that is no LoRA matrix.
    """
    path, config_path = directory / SAFETENSORS_WEIGHTS_NAME, directory / ADAPTER_CONFIG
    state, start = load_file(path), load_file(initial / SAFETENSORS_WEIGHTS_NAME)
    for name, tensor in state.items():
        if ".lora_A." in name:
            state[name] = torch.cat([tensor, start[name]], dim=0)
        elif ".lora_B." in name:
            state[name] = torch.cat([tensor, -start[name]], dim=1)
    save_file(state, path, metadata={"format": "pt"})
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["init_lora_weights"] = True
    config["r"] *= 2
    config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def load_adapter(model: nn.Module, directory: Path) -> PeftModel:
    """Puts a saved adapter on its base, strictly: every key has a place and every place a key.

    Args:
        model: the base, with a head of the adapter's number of classes.
        directory: of the adapter.

    Raises:
        UserError: no adapter there, keys missing or left over, or shapes that differ.
    """
    path = directory / SAFETENSORS_WEIGHTS_NAME
    config_path = directory / ADAPTER_CONFIG
    for file in (config_path, path):
        if not file.is_file():
            raise UserError(f"{directory} is no adapter: it has no {file.name}")
    try:
        config: Any = LoraConfig.from_pretrained(str(directory))
        state = load_file(path)
    except (json.JSONDecodeError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"the adapter in {directory} is damaged: {error}") from error
    config.inference_mode = True
    config.init_lora_weights = True
    try:
        adapted = PeftModel(model, config)
    except ValueError as error:
        raise UserError(f"the adapter in {directory} does not fit {type(model).__name__}: {error}") from error
    _require_same_keys(state, get_peft_model_state_dict(adapted), directory)
    set_peft_model_state_dict(adapted, state)
    return adapted.eval()


def _require_same_keys(found: dict[str, Tensor], expected: dict[str, Tensor], directory: Path) -> None:
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"left over {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} is {list(found[name].shape)} and should be {list(expected[name].shape)}"
        for name in sorted(found.keys() & expected.keys())
        if found[name].shape != expected[name].shape
    ]
    if problems:
        raise UserError("\n  ".join([f"the adapter in {directory} does not fit this base model:", *problems]))


def merge(model: nn.Module) -> nn.Module:
    """The base model with the adapter folded into its weights, in fp32; `model` is used up.

    Raises:
        UserError: the merged weights are not finite.
    """
    assert isinstance(model, PeftModel)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"the adapter cannot be merged: {error}") from error


def is_counted(name: str) -> bool:
    """Whether a parameter counts: PEFT keeps an untrained copy of each head, which does not."""
    return ".original_module." not in name


def is_lora_b(name: str) -> bool:
    """Whether a parameter is a B matrix, which LoRA+ trains at a higher rate."""
    return ".lora_B." in name
