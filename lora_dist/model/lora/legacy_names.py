"""Maps the names of a model's parameters and modules to those of transformers 4.

Transformers 5 renamed the modules of ViT, DeiT, BEiT, Swin, DINOv2 and others, but saves weights under the old names.
The mapping is read from a checkpoint that transformers itself writes, so it works for any architecture.
"""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_dist.model.lora.adapter_io import split_lora_name


@dataclass(frozen=True)
class LegacyNames:
    """Maps current to old names.

    Attributes:
        parameters: of parameters and buffers.
        modules: of modules whose parameters have the same last component in both.
    """

    parameters: Mapping[str, str]
    modules: Mapping[str, str]

    @classmethod
    def of(cls, model: Any) -> "LegacyNames":
        """Returns the names of a `transformers` model, with or without LoRA, by `PreTrainedModel.save_pretrained`."""
        names = list(current_names(model))
        with tempfile.TemporaryDirectory() as directory:
            # float32 represents integers up to 2**24 exactly.
            marked = {name: torch.tensor([float(number)]) for number, name in enumerate(names)}
            model.save_pretrained(directory, state_dict=marked)
            written: dict[str, torch.Tensor] = {}
            for file in Path(directory).glob("*.safetensors"):
                written |= load_file(file)
        # Parameters that are fused or split on saving have no single old name.
        parameters = {names[int(tensor)]: old for old, tensor in written.items() if tensor.numel() == 1}
        return cls(parameters, _modules(parameters))

    def to_old(self, name: str) -> str:
        """Converts a plain name to the old one; unknown names stay."""
        target, lora = split_lora_name(name)
        return (self.modules if lora else self.parameters).get(target, target) + lora

    def to_current(self, name: str) -> str:
        """Converts an old plain name to the current one; unknown names stay."""
        target, lora = split_lora_name(name)
        return (self._current_modules if lora else self._current_parameters).get(target, target) + lora

    @cached_property
    def _current_parameters(self) -> dict[str, str]:
        return {old: current for current, old in self.parameters.items()}

    @cached_property
    def _current_modules(self) -> dict[str, str]:
        return {old: current for current, old in self.modules.items()}

    def are_used_by(self, names: Iterable[str]) -> bool:
        """Whether more of these plain names are old than current names of the model."""
        targets = [split_lora_name(name) for name in names]
        old = sum(target in (self._current_modules if lora else self._current_parameters) for target, lora in targets)
        current = sum(target in (self.modules if lora else self.parameters) for target, lora in targets)
        return old > current


def current_names(model: Any) -> dict[str, None]:
    """Returns the names of a model's parameters and buffers, in order, as without LoRA."""
    return dict.fromkeys(
        name.replace(".base_layer.", ".").replace(".original_module.", ".")
        for name in model.state_dict()
        if ".lora_" not in name and ".modules_to_save." not in name
    )


def _modules(parameters: Mapping[str, str]) -> dict[str, str]:
    modules: dict[str, str] = {}
    for current, old in parameters.items():
        above, _, leaf = current.rpartition(".")
        above_old, _, leaf_old = old.rpartition(".")
        while above and above_old and leaf == leaf_old:
            modules[above] = above_old
            above, _, leaf = above.rpartition(".")
            above_old, _, leaf_old = above_old.rpartition(".")
    return modules
