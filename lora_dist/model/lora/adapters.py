"""Adapters of an image classifier: save, load strictly, several on one base, merge.

Only this module, `injection` and `lora_layer` import peft.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_dist.errors import UserError, first_line
from lora_dist.model.base.model_files import ADAPTER_CONFIG
from lora_dist.model.lora import adapter_io
from lora_dist.model.lora.adapter_io import WEIGHTS, AdapterFiles
from lora_dist.model.lora.legacy_names import LegacyNames, current_names
from lora_dist.model.lora.parameter_names import DEFAULT, is_lora_b


def mutates_base(model: nn.Module) -> bool:
    """Whether the initialisation changed the base (PiSSA), which `save_adapter` has to convert back."""
    return isinstance(model, PeftModel) and getattr(model.peft_config[DEFAULT], "init_lora_weights", "") == "pissa"


def save_adapter(model: nn.Module, directory: Path, initial: Path | None = None) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    If `mutates_base`, pass the directory of the initial adapter: the result is LoRA of twice the rank on the unchanged
    base.

    Raises:
        ValueError: a tensor is empty, as in a sharded model (peft#2892).
    """
    assert isinstance(model, PeftModel)
    empty = [name for name, tensor in get_peft_model_state_dict(model).items() if tensor.numel() == 0]
    if empty:
        raise ValueError(f"empty tensors in the adapter: {', '.join(empty)}")
    model.save_pretrained(str(directory))
    if initial is not None:
        _make_plain(directory, initial)


@dataclass(frozen=True)
class Adapter:
    """An adapter in the module names of a base model.

    Attributes:
        config: PEFT's `LoraConfig`.
        state: tensors under plain names (see `AdapterFiles`).
        names: the legacy names, if the adapter was saved under these.
        directory: where the files are.
    """

    config: Any
    state: dict[str, Tensor]
    names: LegacyNames | None
    directory: Path


def adapter_for(model: nn.Module, files: AdapterFiles) -> Adapter:
    """Converts an adapter of any release of PEFT and `transformers` to the names of a base model.

    Raises:
        UserError: the configuration is damaged, or targets no module of this model.
    """
    base, directory = base_of(model), files.directory
    # PEFT warns of unknown fields. Those that are set matter: the result may differ.
    known = {field.name for field in fields(LoraConfig)}
    given = {name: value for name, value in files.config.items() if name in known or value}
    with _as_user_error(f"the adapter in {directory} is damaged: {ADAPTER_CONFIG}"):
        config: Any = LoraConfig.from_peft_type(**given)
    _check_types(config, directory)
    config.inference_mode = True
    config.init_lora_weights = True
    current = current_names(base)
    modules = {name.rpartition(".")[0] for name in current}
    targets = map(adapter_io.split_lora_name, files.state)
    is_current = all(target in (modules if lora else current) for target, lora in targets)
    if is_current or not (names := LegacyNames.of(base)).are_used_by(files.state):
        return Adapter(config, files.state, None, directory)
    state = {names.to_current(name): tensor for name, tensor in files.state.items()}
    mismatch = f"the adapter in {directory} does not fit {type(base).__name__}"
    with _as_user_error(mismatch):
        _rename_targets(config, names, state, mismatch)
    return Adapter(config, state, names, directory)


def attach_adapter(model: nn.Module, adapter: Adapter, name: str = DEFAULT, num_labels: int | None = None) -> PeftModel:
    """Puts an adapter on its base, which may have other adapters and another number of classes, and activates it.

    Raises:
        UserError: keys are missing or unexpected, or shapes differ.
    """
    before: list[Any] = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    if before and any(config.bias != "none" for config in [*before, adapter.config]):
        # PEFT does not always notice, and the biases of one adapter would remain when another one is active.
        raise UserError(f"the adapter in {adapter.directory} or one before it trains biases; load it alone")
    with _as_user_error(f"the adapter in {adapter.directory} does not fit {type(base_of(model)).__name__}"):
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
    """Returns the `transformers` model without the wrapper of PEFT."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def activate(model: nn.Module, name: str) -> None:
    """Activates one of several adapters."""
    assert isinstance(model, PeftModel)
    if model.active_adapter != name:
        model.set_adapter(name)


def active_adapter(model: nn.Module) -> Adapter:
    """Returns a copy of the active adapter, on the CPU."""
    assert isinstance(model, PeftModel)
    name = str(model.active_adapter)
    state = {plain: tensor.detach().cpu() for plain, _, tensor in _adapter_tensors(model, name)}
    return Adapter(model.peft_config[name], state, None, Path(name))


def scale_update(model: nn.Module, factor: float) -> None:
    """Multiplies the update of LoRA by a factor, in each of the adapters of a model.

    Raises:
        UserError: an adapter has no LoRA, or uses DoRA, which rescales the sum of weight and update.
    """
    assert isinstance(model, PeftModel)
    configs: list[Any] = list(model.peft_config.values())
    if any(config.use_dora for config in configs):
        raise UserError("the update of DoRA cannot be scaled, because DoRA rescales the sum of weight and update")
    matrices = [parameter for name, parameter in model.named_parameters() if is_lora_b(name)]
    if not matrices:
        raise UserError("there is no LoRA update to scale: only the head was trained")
    with torch.no_grad():
        for matrix in matrices:
            matrix.mul_(factor)


def set_adapter_state(model: nn.Module, adapter: Adapter, state: Mapping[str, Tensor], name: str = DEFAULT) -> None:
    """Loads tensors under plain names into an adapter of a model.

    Raises:
        UserError: keys are missing or unexpected, or shapes differ; the message has the names of the adapter's files.
    """
    assert isinstance(model, PeftModel)
    found = list(_adapter_tensors(model, name))
    shown = adapter.names.to_old if adapter.names else None
    adapter_io.require_same_names(state, {plain: tensor for plain, _, tensor in found}, adapter.directory, shown)
    set_peft_model_state_dict(model, {key: state[plain] for plain, key, _ in found}, name)


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has an adapter that is not merged."""
    return isinstance(model, PeftModel)


def merge(model: nn.Module) -> nn.Module:
    """Merges the adapter into the base in fp32, in place, and returns the base.

    Raises:
        UserError: the merged weights are not finite.
    """
    assert isinstance(model, PeftModel)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"the adapter cannot be merged: {error}") from error


def rank_and_alpha(config: Any, layer: str) -> tuple[int, float]:
    """Returns rank and alpha of a layer, by its name in the base, from a `LoraConfig` and its patterns."""
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    rank = ranks.get(get_pattern_key(list(ranks), layer), config.r)
    return rank, alphas.get(get_pattern_key(list(alphas), layer), config.lora_alpha)


def plain_state(state: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts an adapter on a base that its initialization changed to one of twice the rank on the unchanged base.

    Args:
        state: trained tensors.
        start: the same before training.
    """
    plain = dict(state)
    for name, tensor in state.items():
        if ".lora_A." in name:
            plain[name] = torch.cat([tensor, start[name]], dim=0)
        elif ".lora_B." in name:
            plain[name] = torch.cat([tensor, -start[name]], dim=1)
    return plain


def _make_plain(directory: Path, initial: Path) -> None:
    """Converts a saved adapter to LoRA on the unchanged base: B A - B0 A0 = [B, -B0] [A; A0].

    PEFT's own conversion in `save_pretrained` loses the heads and all other tensors that are not LoRA matrices.
    """
    path, config_path = directory / WEIGHTS, directory / ADAPTER_CONFIG
    save_file(plain_state(load_file(path), load_file(initial / WEIGHTS)), path, metadata={"format": "pt"})
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["init_lora_weights"] = True
    alpha_factor = 2**0.5 if config["use_rslora"] else 2
    config["r"] *= 2
    config["lora_alpha"] *= alpha_factor
    config["rank_pattern"] = {name: 2 * rank for name, rank in config["rank_pattern"].items()}
    config["alpha_pattern"] = {name: alpha_factor * alpha for name, alpha in config["alpha_pattern"].items()}
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


@contextmanager
def _as_user_error(prefix: str) -> Iterator[None]:
    """Converts unexpected exceptions, except `MemoryError`, to a `UserError`: PEFT does not check adapter settings."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{prefix}: {first_line(error)}") from error


def _check_types(config: Any, directory: Path) -> None:
    """Raises a `UserError` for rank, scale, bias or pattern of a wrong type, which PEFT accepts."""

    def is_pattern(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(number, int | float) for number in value.values())

    valid = {
        "r": isinstance(config.r, int) and config.r > 0,
        "lora_alpha": isinstance(config.lora_alpha, int | float),
        "bias": config.bias in ("none", "all", "lora_only"),
        "rank_pattern": is_pattern(config.rank_pattern),
        "alpha_pattern": is_pattern(config.alpha_pattern),
    }
    for name in (name for name, is_valid in valid.items() if not is_valid):
        value = getattr(config, name)
        raise UserError(f"the adapter in {directory} is damaged: {ADAPTER_CONFIG} has {name} {value!r}")


def _rename_targets(config: Any, names: LegacyNames, state: Mapping[str, Tensor], mismatch: str) -> None:
    """Rewrites targets, patterns and `modules_to_save` to the model's full module names."""
    leaves = [module for module in names.modules if f"{module}.weight" in names.parameters]
    found = [
        {module: name for module, name in named if check_target_module_exists(config, name)}
        # Some adapters have current targets but legacy keys.
        for named in ([(module, names.modules[module]) for module in leaves], [(module, module) for module in leaves])
    ]
    adapted = {target for target, lora in map(adapter_io.split_lora_name, state) if lora}
    targets = next((given for given in found if given.keys() == adapted), found[0] or found[1])
    if not targets and adapted:
        raise UserError(f"{mismatch}: it has no modules {config.target_modules}")
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


def _adapter_tensors(model: PeftModel, name: str) -> Iterator[tuple[str, str, Tensor]]:
    """Yields plain name, PEFT's key and tensor; several keys may have one plain name."""
    for key, tensor in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items():
        plain = adapter_io.plain_name(key)
        if plain is not None:
            yield plain, key, tensor


def _fit_heads(model: PeftModel, name: str, state: Mapping[str, Tensor], num_labels: int) -> None:
    """Resizes the heads of an adapter to its number of classes, if the base has another number."""
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
