"""An adapter in the names of transformers 4 and the files of early PEFT, checked to classify as before."""

import copy
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.deployment.export.destinations import require_free_directory
from lora_dist.deployment.export.merge import check_images, logits, require_read_back
from lora_dist.model import adapters, bundle
from lora_dist.model.adapter_io import ADAPTER_CONFIG, OLD_WEIGHTS, PREFIX, WEIGHTS, split_lora_name
from lora_dist.model.classifier import Classifier
from lora_dist.model.legacy_names import LegacyNames
from lora_dist.storage.files import whole_directory


def card_of(directories: Sequence[Path], title: str) -> str:
    """The card of an adapter to export. A blend is none of its adapters, whose numbers are not its own.

    Args:
        directories: of the adapter, or of all that are blended.
        title: where there is no card to copy.
    """
    own = directories[0] / "README.md"
    if len(directories) == 1 and own.is_file():
        return own.read_text(encoding="utf-8", errors="replace")
    what = "A LoRA adapter" if len(directories) == 1 else "The weighted sum of LoRA adapters, as one adapter"
    return f"# {title}\n\n{what}, with the names of transformers 4. Written by lora_dist.\n"


def export_legacy_names(
    classifier: Classifier, card: str, out: Path, files: Sequence[str], trust_remote_code: bool = False
) -> None:
    """Writes the active adapter as a bundle that releases before transformers 5 read as well.

    PEFT read `adapter_model.bin` alone before 0.5, and prefers safetensors since: both are there.

    Args:
        classifier: with the adapter.
        card: content of the model card.
        out: must not exist, or be empty.
        files: images to compare logits on; the first that can be read are taken, else packaged photographs.
        trust_remote_code: run code that comes with the base.

    Raises:
        UserError: `out` holds something or cannot be made, or what was written gives other logits when it is read.
    """
    require_free_directory(out, "export_legacy_names")
    images = check_images(files)
    expected = logits(classifier.model, ImageTransforms(classifier.processor).batch(images))
    adapter = adapters.active_adapter(classifier.model)
    names = LegacyNames.of(adapters.base_of(classifier.model))
    assert classifier.base is not None
    state = _old_keys(adapter.state, names)
    # A base of several adapters has the labels of the first one.
    labelled = copy.deepcopy(adapters.base_of(classifier.model).config)
    labelled.id2label = dict(enumerate(classifier.labels))
    labelled.label2id = {label: index for index, label in enumerate(classifier.labels)}
    with whole_directory(out) as aside:
        save_file(state, aside / WEIGHTS, metadata={"format": "pt"})
        pickled = io.BytesIO()
        torch.save(state, pickled)
        (aside / OLD_WEIGHTS).write_bytes(pickled.getbuffer())
        content = _config(adapter.config, classifier.base["model_name_or_path"], adapter.state, names)
        (aside / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        bundle.write_company(aside, labelled, classifier.processor, classifier.base, card)
        require_read_back(aside, out, "export_legacy_names", images, expected, trust_remote_code)


def _old_keys(state: dict[str, Tensor], names: LegacyNames) -> dict[str, Tensor]:
    adapted = {target for target, lora in map(split_lora_name, state) if lora}
    keys: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = PREFIX + names.to_old(name)
        keys[key] = tensor.clone().contiguous()
        module, _, leaf = key.rpartition(".")
        if name.rpartition(".")[0] in adapted:
            # A bias beside LoRA: PEFT before 0.6 knew no `base_layer`. What a release does not know it passes over.
            keys[f"{module}.base_layer.{leaf}"] = tensor.clone().contiguous()
    return keys


def _config(config: Any, base: str | None, state: dict[str, Tensor], names: LegacyNames) -> dict[str, Any]:
    """What every release knows, and of the rest only what is in use: many refuse a name that they do not know."""
    adapted = [names.modules[target] for target, lora in map(split_lora_name, state) if lora]
    content = {
        "base_model_name_or_path": base,
        "bias": config.bias,
        "fan_in_fan_out": config.fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": [names.modules.get(name, name) for name in config.modules_to_save or []] or None,
        "peft_type": "LORA",
        "r": config.r,
        "target_modules": _targets(adapted, names.modules.values()) if adapted else sorted(config.target_modules),
        "task_type": None,
    }
    in_use = {
        "revision": config.revision if base == config.base_model_name_or_path else None,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": {names.modules.get(name, name): rank for name, rank in config.rank_pattern.items()},
        "alpha_pattern": {names.modules.get(name, name): alpha for name, alpha in config.alpha_pattern.items()},
    }
    return content | {name: value for name, value in in_use.items() if value}


def _targets(adapted: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Last components of these names where they name nothing else; PEFT 0.2 compared without the dot before."""
    wanted = set(adapted)
    last = sorted({name.rpartition(".")[2] for name in wanted})
    return last if {name for name in modules if name.endswith(tuple(last))} == wanted else sorted(wanted)
