"""Reads the files of an adapter, in the format of any release of PEFT."""

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_dist.errors import UserError, first_line
from lora_dist.model.base.model_files import ADAPTER_CONFIG, require_content, result_hint

WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."

_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")


@dataclass(frozen=True)
class AdapterFiles:
    """The content of `adapter_config.json`, and the tensors under plain names (see `plain_name`)."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    directory: Path


def read(directory: Path) -> AdapterFiles:
    """Reads an adapter's configuration and weights; a pickle is read with `weights_only=True`.

    Raises:
        UserError: a file is missing or damaged, a weight is not finite, or the adapter is not LoRA.
    """
    config, file = _read_config(directory), _weights_file(directory)
    state: dict[str, Tensor] = {}
    for key, tensor in _read_weights(file).items():
        if not tensor.float().isfinite().all():
            raise UserError(f"the adapter in {directory} is damaged: {key} in {file.name} is not finite")
        name = plain_name(key)
        if name is None:
            continue
        if name in state and not torch.equal(state[name], tensor):
            raise UserError(f"the adapter in {directory} is damaged: it has two different tensors for {name}")
        state[name] = tensor
    return AdapterFiles(config, state, directory)


def require_adapter(directory: Path) -> None:
    """Raises a `UserError`, with a hint, unless a directory holds an adapter."""
    if not directory.is_dir():
        raise UserError(f"no such directory: {directory}")
    if (directory / ADAPTER_CONFIG).is_file():
        return
    instead = result_hint(directory)
    if (directory / "config.json").is_file():
        instead = ". It is a whole model: pass it to predict as --model, and to train as --model_name_or_path"
    raise UserError(f"{directory} is not an adapter: it has no {ADAPTER_CONFIG}{instead}")


def plain_name(key: str) -> str | None:
    """Removes the parts that PEFT's wrappers add to a key, which differ by release; None for the untrained copy of a
    module.

    `base_model.model.classifier.modules_to_save.bias` -> `classifier.bias`,
    `base_model.model.vit.layers.0.attention.q_proj.base_layer.bias` -> `vit.layers.0.attention.q_proj.bias`.
    """
    if ".original_module." in key:
        return None
    return key.removeprefix(PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")


def split_lora_name(name: str) -> tuple[str, str]:
    """Splits a plain name into the name of a module and its LoRA suffix; the suffix of other parameters is empty."""
    module, lora, rest = name.partition(".lora_")
    return module, lora + rest


def require_same_names(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    directory: Path,
    shown: Callable[[str], str] | None = None,
) -> None:
    """Compares an adapter's tensors with those that its base expects, by plain name and shape.

    Raises:
        UserError: lists missing and unexpected names, and those of another shape, as `shown` converts them.
    """

    def key(name: str) -> str:
        return PREFIX + (shown(name) if shown else name)

    problems = [f"missing {key(name)}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {key(name)}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{key(name)} is {list(found[name].shape)} and should be {list(expected[name].shape)}"
        for name in sorted(found.keys() & expected.keys())
        if found[name].shape != expected[name].shape
    ]
    if problems:
        raise UserError("\n  ".join([f"the adapter in {directory} does not fit this base model:", *problems]))


def _read_config(directory: Path) -> dict[str, Any]:
    require_adapter(directory)
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        kind = config.get("peft_type", "LORA")
    except (ValueError, AttributeError) as error:
        raise UserError(f"the adapter in {directory} is damaged: {error}") from error
    if kind != "LORA":
        raise UserError(f"the adapter in {directory} is of type {kind}; only LORA is supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_BASE_CHANGING):
        # Its matrices belong to a base that the initialisation changed, and do not fit the one on disk.
        raise UserError(
            f"the adapter in {directory} was saved for the base that init_lora_weights={start!r} changed. "
            f"Save it as plain LoRA first: save_pretrained(…, path_initial_model_for_weight_conversion=…) of PEFT."
        )
    return config


def _weights_file(directory: Path) -> Path:
    for name in (WEIGHTS, OLD_WEIGHTS):
        if (directory / name).is_file():
            return directory / name
    raise UserError(f"{directory} is not an adapter: it has no {WEIGHTS} (nor {OLD_WEIGHTS}, as old releases wrote)")


def _read_weights(file: Path) -> dict[str, Tensor]:
    damaged = f"the adapter in {file.parent} is damaged:"
    require_content(file)
    try:
        if file.name == WEIGHTS:
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to run the code in it.
        raise UserError(
            f"{damaged} {file.name} holds more than tensors, and is not opened. Ask its author for "
            f"{WEIGHTS}, or for a file that torch.load reads with weights_only=True"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        # A crafted pickle makes torch raise any exception.
        raise UserError(f"{damaged} {first_line(error)}") from error
    if isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        return state
    raise UserError(f"{damaged} {file.name} is not a dictionary of tensors")
