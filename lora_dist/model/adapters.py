"""LoRA on an image classifier: inject, save, load strictly, merge. Only this module and `lora_layer` import peft."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_dist.errors import UserError
from lora_dist.model import adapter_io, lora_layer
from lora_dist.model.adapter_io import ADAPTER_CONFIG, WEIGHTS
from lora_dist.model.legacy_names import LegacyNames, current_names
from lora_dist.model.targets import resolve_targets
from lora_dist.settings.train import LoraSettings

DEFAULT = "default"
"""PEFT's name of the only adapter."""


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
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"{type(model).__name__} cannot be adapted with these settings of LoRA: {error} "
            f"(--init_lora_weights pissa, for one, is for linear layers only)"
        ) from error
    lora_layer.speed_up(adapted)
    return adapted


def inject_head_only(model: nn.Module, heads: Sequence[str]) -> PeftModel:
    """Freezes all but the heads, in the format of an adapter: a linear probe is saved and loaded like LoRA."""
    return get_peft_model(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=list(heads)))


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Takes LoRA out of the computation, and lets the backward pass go as far as it does with it: what LoRA costs."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    hooks = [layer.register_forward_hook(_with_gradient) for layer in layers]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for hook in hooks:
            hook.remove()


def _with_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


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
    path, config_path = directory / WEIGHTS, directory / ADAPTER_CONFIG
    state, start = load_file(path), load_file(initial / WEIGHTS)
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


@dataclass(frozen=True)
class Adapter:
    """An adapter as read for a certain base model.

    Attributes:
        config: PEFT's `LoraConfig`, with targets in the names of the model.
        state: tensors under plain names of the model (see `adapter_files`).
        names: the old names, where the adapter was saved under these.
        directory: where it came from.
    """

    config: Any
    state: dict[str, Tensor]
    names: LegacyNames | None
    directory: Path


def read_adapter(model: nn.Module, directory: Path) -> Adapter:
    """Reads an adapter for a base model, whichever release of PEFT and `transformers` saved it.

    Args:
        model: the base, with or without adapters on it.
        directory: of the adapter.

    Raises:
        UserError: no adapter there, or a damaged one, or one that targets nothing in this model.
    """
    base = base_of(model)
    files = adapter_io.read(directory)
    # PEFT warns of what it does not know, rightly so where it is set: the numbers may differ then.
    known = {field.name for field in fields(LoraConfig)}
    given = {name: value for name, value in files.config.items() if name in known or value}
    with _refused(f"the adapter in {directory} is damaged: {ADAPTER_CONFIG}"):
        config: Any = LoraConfig.from_peft_type(**given)
    _require_sense(config, directory)
    config.inference_mode = True
    config.init_lora_weights = True
    current = current_names(base)
    modules = {name.rpartition(".")[0] for name in current}
    if all(target in (modules if lora else current) for target, lora in map(adapter_io.split_lora_name, files.state)):
        return Adapter(config, files.state, None, directory)
    names = LegacyNames.of(base)
    if not names.are_used_by(files.state):
        return Adapter(config, files.state, None, directory)
    state = {names.to_current(name): tensor for name, tensor in files.state.items()}
    refused = f"the adapter in {directory} does not fit {type(base).__name__}"
    with _refused(refused):
        _modernise(config, names, state, refused)
    return Adapter(config, state, names, directory)


@contextmanager
def _refused(words: str) -> Iterator[None]:
    """Turns whatever PEFT raises at settings that it does not check into a `UserError` that begins with these words."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{words}: {reason}") from error


def _require_sense(config: Any, directory: Path) -> None:
    """Raises a `UserError` where settings of the shape of LoRA are not of their kind: PEFT takes any."""
    numbers = (int, float)
    sense = {
        "r": isinstance(config.r, int) and config.r > 0,
        "lora_alpha": isinstance(config.lora_alpha, numbers),
        "bias": config.bias in ("none", "all", "lora_only"),
        **{
            name: isinstance(pattern := getattr(config, name), dict)
            and all(isinstance(value, numbers) for value in pattern.values())
            for name in ("rank_pattern", "alpha_pattern")
        },
    }
    for name, makes_sense in sense.items():
        if not makes_sense:
            raise UserError(
                f"the adapter in {directory} is damaged: {ADAPTER_CONFIG} has {name} {getattr(config, name)!r}"
            )


def _modernise(config: Any, names: LegacyNames, state: Mapping[str, Tensor], refused: str) -> None:
    """Puts the targets, and what else goes by names, into the names of the model: whole ones, each one target."""
    leaves = [module for module in names.modules if f"{module}.weight" in names.parameters]
    found = [
        {module: name for module, name in named if check_target_module_exists(config, name)}
        # Somebody may have renamed the targets, but not the keys.
        for named in ([(module, names.modules[module]) for module in leaves], [(module, module) for module in leaves])
    ]
    adapted = {target for target, lora in map(adapter_io.split_lora_name, state) if lora}
    targets = next((given for given in found if given.keys() == adapted), found[0] or found[1])
    if not targets and adapted:
        raise UserError(f"{refused}: no {config.target_modules} in it")
    for pattern in ("rank_pattern", "alpha_pattern"):
        given = getattr(config, pattern)
        keys = {module: get_pattern_key(list(given), old) for module, old in targets.items()}
        setattr(config, pattern, {module: given[key] for module, key in keys.items() if key in given})
    if targets:
        config.target_modules = set(targets)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.modules_to_save = [
        module
        for module, old in names.modules.items()
        if any(old == name or old.endswith(f".{name}") for name in config.modules_to_save or [])
    ] or None


def load_adapter(model: nn.Module, directory: Path, name: str = DEFAULT, num_labels: int | None = None) -> PeftModel:
    """Puts a saved adapter on its base, strictly: every key has a place and every place a key.

    Args:
        model: the base, with a head of the adapter's number of classes; or a base with adapters already.
        directory: of the adapter.
        name: to `activate` it by, in the second case.
        num_labels: of the adapter, in the second case: its head may be of another size than those before.

    Raises:
        UserError: no adapter there, keys missing or left over, or shapes that differ.
    """
    return attach_adapter(model, read_adapter(model, directory), name, num_labels)


def attach_adapter(model: nn.Module, adapter: Adapter, name: str = DEFAULT, num_labels: int | None = None) -> PeftModel:
    """Puts an adapter that was read on its base, as `load_adapter` does; the one put on last is active."""
    before: list[Any] = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    if before and any(config.bias != "none" for config in [*before, adapter.config]):
        # PEFT does not always see it, and the biases of one would stay when another one is active.
        raise UserError(f"the adapter in {adapter.directory} or one before it trains biases, and has to stand alone")
    with _refused(f"the adapter in {adapter.directory} does not fit {type(base_of(model)).__name__}"):
        if isinstance(model, PeftModel):
            adapted = model
            adapted.add_adapter(name, adapter.config)
        else:
            adapted = PeftModel(model, adapter.config, name)
    if num_labels is not None:
        _fit_heads(adapted, name, adapter.state, num_labels)
    set_adapter_state(adapted, adapter, adapter.state, name)
    adapted.set_adapter(name)
    return adapted.eval()


def base_of(model: nn.Module) -> Any:
    """The `transformers` model under an adapter, or the model itself where there is none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def activate(model: nn.Module, name: str) -> None:
    """Makes one of several adapters the one that the model runs with."""
    assert isinstance(model, PeftModel)
    model.set_adapter(name)


def active_adapter(model: nn.Module) -> Adapter:
    """The adapter that a model runs with."""
    assert isinstance(model, PeftModel)
    name = str(model.active_adapter)
    state = {}
    for key, tensor in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items():
        plain = adapter_io.plain_name(key)
        if plain is not None:
            state[plain] = tensor.detach().cpu()
    return Adapter(model.peft_config[name], state, None, Path(name))


def set_adapter_state(model: nn.Module, adapter: Adapter, state: Mapping[str, Tensor], name: str = DEFAULT) -> None:
    """Puts tensors under plain names into an adapter of a model, strictly.

    Raises:
        UserError: keys missing or left over, or shapes that differ, in the names that the adapter's files have.
    """
    assert isinstance(model, PeftModel)
    slots: dict[str, list[str]] = {}
    expected: dict[str, Tensor] = {}
    for key, tensor in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items():
        plain = adapter_io.plain_name(key)
        if plain is not None:
            slots.setdefault(plain, []).append(key)
            expected[plain] = tensor
    shown = adapter.names.to_old if adapter.names else None
    adapter_io.require_same_names(state, expected, adapter.directory, shown)
    set_peft_model_state_dict(model, {key: state[plain] for plain, keys in slots.items() for key in keys}, name)


def _fit_heads(model: PeftModel, name: str, state: Mapping[str, Tensor], num_labels: int) -> None:
    """Gives the heads of one adapter its number of classes, where the base has the number of another one."""
    base = base_of(model)
    before = base.config.num_labels
    if before == num_labels:
        return
    for prefix, wrapper in base.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or name not in wrapper.modules_to_save:
            continue
        for inner, module in wrapper.modules_to_save[name].named_modules(prefix=prefix):
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                found = state.get(f"{inner}.{leaf}")
                if found is not None and (parameter.shape[0], len(found)) == (before, num_labels):
                    shape = (num_labels, *parameter.shape[1:])
                    setattr(module, leaf, nn.Parameter(parameter.new_empty(shape), requires_grad=False))
                    if isinstance(module, nn.Linear):
                        module.out_features = num_labels


def is_adapted(model: nn.Module) -> bool:
    """Whether a model carries an adapter that is not merged."""
    return isinstance(model, PeftModel)


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
