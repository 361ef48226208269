"""Names of a model's parts in transformers 4, from what transformers 5 itself writes into checkpoints.

Transformers 5 renamed the modules of ViT, DeiT, BEiT, Swin, DINOv2 and others, and still saves weights under the old
names, which every release reads. So the names that it gives to marked tensors tell how it renames, for any
architecture, without a table of our own.
"""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_dist.model.adapter_io import split_lora_name


@dataclass(frozen=True)
class LegacyNames:
    """Old names of a model's parameters and modules.

    Attributes:
        parameters: today's name of each parameter and buffer to its old one.
        modules: the same for modules whose parameters are named alike in both.
    """

    parameters: Mapping[str, str]
    modules: Mapping[str, str]

    @classmethod
    def of(cls, model: Any) -> "LegacyNames":
        """The names of a `transformers` model; LoRA in its modules makes no difference.

        Source: `PreTrainedModel.save_pretrained`, which undoes the renaming that loading did.
        """
        names = list(current_names(model))
        with tempfile.TemporaryDirectory() as directory:
            # A float tells integers up to 2**24 apart.
            marked = {name: torch.tensor([float(number)]) for number, name in enumerate(names)}
            model.save_pretrained(directory, state_dict=marked)
            written: dict[str, torch.Tensor] = {}
            for file in Path(directory).glob("*.safetensors"):
                written |= load_file(file)
        # What is fused or split on the way has no single old name, and so none at all here.
        parameters = {names[int(tensor)]: old for old, tensor in written.items() if tensor.numel() == 1}
        return cls(parameters, _modules(parameters))

    def to_old(self, name: str) -> str:
        """The old form of a plain name of `adapter_files`; unknown names stay."""
        target, lora = split_lora_name(name)
        return (self.modules if lora else self.parameters).get(target, target) + lora

    def to_current(self, name: str) -> str:
        """Today's form of an old plain name; unknown names stay."""
        target, lora = split_lora_name(name)
        return (self._current_modules if lora else self._current_parameters).get(target, target) + lora

    @cached_property
    def _current_parameters(self) -> dict[str, str]:
        return {old: current for current, old in self.parameters.items()}

    @cached_property
    def _current_modules(self) -> dict[str, str]:
        return {old: current for current, old in self.modules.items()}

    def are_used_by(self, names: Iterable[str]) -> bool:
        """Whether these plain names are of an old release: more of them have a place there than in the model."""
        targets = [split_lora_name(name) for name in names]
        old = sum(target in (self._current_modules if lora else self._current_parameters) for target, lora in targets)
        current = sum(target in (self.modules if lora else self.parameters) for target, lora in targets)
        return old > current


def current_names(model: Any) -> dict[str, None]:
    """Today's names of a model's parameters and buffers, in order, as they are without any LoRA."""
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
