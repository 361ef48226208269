"""The files of an adapter as they stand on disk, whichever release of PEFT wrote them."""

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_dist.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."

_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")


@dataclass(frozen=True)
class AdapterFiles:
    """What the directory of an adapter holds.

    Attributes:
        config: content of `adapter_config.json`.
        state: tensors under plain names: those of the model's parameters, or of a module and `lora_A.weight` …
        directory: where they came from.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    directory: Path

    def modules_to_save(self) -> list[str]:
        """Names of the modules that the adapter brings whole."""
        return list(self.config.get("modules_to_save") or [])


def read(directory: Path) -> AdapterFiles:
    """Reads an adapter's configuration and weights; an old pickle is read as tensors alone, without running code.

    Raises:
        UserError: a file is missing or damaged, a number is not finite, or this is another kind of adapter than LoRA.
    """
    config, file = read_config(directory), _weights_file(directory)
    state: dict[str, Tensor] = {}
    for key, tensor in _read_weights(file).items():
        if not tensor.float().isfinite().all():
            raise UserError(
                f"the adapter in {directory} is damaged: {file.name} has numbers in {key} that are not finite"
            )
        name = plain_name(key)
        if name is None:
            continue
        if name in state and not torch.equal(state[name], tensor):
            raise UserError(f"the adapter in {directory} is damaged: it has two different tensors for {name}")
        state[name] = tensor
    return AdapterFiles(config, state, directory)


def require_adapter(directory: Path) -> None:
    """Raises a `UserError`, with what is there instead, unless a directory holds an adapter."""
    if not directory.is_dir():
        raise UserError(f"no such directory: {directory}")
    if (directory / ADAPTER_CONFIG).is_file():
        return
    instead = result_of_run(directory)
    if (directory / "config.json").is_file():
        instead = ". It is a whole model: predict takes it as --model, and train as --model_name_or_path"
    raise UserError(f"{directory} is no adapter: it has no {ADAPTER_CONFIG}{instead}")


def result_of_run(directory: Path) -> str:
    """Words, to end a message with, on where the result is if the directory is that of a run."""
    for inside, file in ((directory / "adapter", ADAPTER_CONFIG), (directory / "model", "config.json")):
        if (inside / file).is_file():
            return f". It is the directory of a run; name the result, {inside}"
    return ""


def read_config(directory: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`.

    Raises:
        UserError: it is missing or damaged, or this is another kind of adapter than LoRA.
    """
    require_adapter(directory)
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        kind = config.get("peft_type", "LORA")
    except (ValueError, AttributeError) as error:
        raise UserError(f"the adapter in {directory} is damaged: {error}") from error
    if kind != "LORA":
        raise UserError(f"the adapter in {directory} is of the kind {kind}; only LORA can be read")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_BASE_CHANGING):
        # Its matrices belong to a base that the initialisation has changed, and would be wrong on the one on disk.
        raise UserError(
            f"the adapter in {directory} was saved on the changed base of init_lora_weights={start!r}. Save it as "
            f"plain LoRA first: save_pretrained(…, path_initial_model_for_weight_conversion=…) of PEFT."
        )
    return config


def _weights_file(directory: Path) -> Path:
    for name in (WEIGHTS, OLD_WEIGHTS):
        if (directory / name).is_file():
            return directory / name
    raise UserError(f"{directory} is no adapter: it has no {WEIGHTS} (and no {OLD_WEIGHTS}, as old releases wrote)")


def _read_weights(file: Path) -> dict[str, Tensor]:
    damaged = f"the adapter in {file.parent} is damaged:"
    try:
        if file.name == WEIGHTS:
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch would advise to run whatever code is in it.
        raise UserError(
            f"{damaged} {file.name} is no pickle of tensors alone, and is not opened. Ask whoever made it for "
            f"{WEIGHTS}, or for a file that torch.load reads with weights_only=True"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        # torch reads a crafted pickle into any exception there is.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{damaged} {reason}") from error
    if isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        return state
    raise UserError(f"{damaged} {file.name} is no dictionary of tensors")


def plain_name(key: str) -> str | None:
    """A key without what PEFT's wrappers put into it, which differs by its release; None for an untrained copy.

    `base_model.model.classifier.modules_to_save.bias` -> `classifier.bias`,
    `base_model.model.vit.layers.0.attention.q_proj.base_layer.bias` -> `vit.layers.0.attention.q_proj.bias`.
    """
    if ".original_module." in key:
        return None
    return key.removeprefix(PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")


def split_lora_name(name: str) -> tuple[str, str]:
    """Splits a plain name into the module or parameter it belongs to, and what LoRA adds to it (or nothing)."""
    module, lora, rest = name.partition(".lora_")
    return module, lora + rest


def require_same_names(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    directory: Path,
    shown: Callable[[str], str] | None = None,
) -> None:
    """Compares the tensors of an adapter with those that its base has a place for.

    Args:
        found: under plain names.
        expected: the same.
        directory: of the adapter.
        shown: a plain name to the one that the adapter's files have, where that is another one.

    Raises:
        UserError: lists names missing, left over or of another shape.
    """

    def key(name: str) -> str:
        return PREFIX + (shown(name) if shown else name)

    problems = [f"missing {key(name)}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"left over {key(name)}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{key(name)} is {list(found[name].shape)} and should be {list(expected[name].shape)}"
        for name in sorted(found.keys() & expected.keys())
        if found[name].shape != expected[name].shape
    ]
    if problems:
        raise UserError("\n  ".join([f"the adapter in {directory} does not fit this base model:", *problems]))
