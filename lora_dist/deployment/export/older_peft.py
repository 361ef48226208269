"""Exports an adapter with the names of transformers 4 and the files of early PEFT, and checks its logits."""

import copy
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lora_dist import demo
from lora_dist.deployment.destinations import require_free_directory
from lora_dist.deployment.export.checks import check_images, logits, require_same_after_loading
from lora_dist.errors import UserError
from lora_dist.model.base.model_files import ADAPTER_CONFIG
from lora_dist.model.lora import adapters
from lora_dist.model.lora.adapter_io import OLD_WEIGHTS, PREFIX, WEIGHTS, split_lora_name
from lora_dist.model.lora.legacy_names import LegacyNames
from lora_dist.model.trained import bundle
from lora_dist.model.trained.classifier import Classifier
from lora_dist.storage.atomic import whole_directory


def card_of(directories: Sequence[Path], title: str, is_scaled: bool = False) -> str:
    """Returns the model card of an exported adapter: its own, or a new one if it is scaled or a weighted sum."""
    own = directories[0] / "README.md"
    if len(directories) == 1 and own.is_file() and not is_scaled:
        return own.read_text(encoding="utf-8", errors="replace")
    what = "A LoRA adapter" if len(directories) == 1 else "The weighted sum of LoRA adapters, as one adapter"
    return f"# {title}\n\n{what}, with the names of transformers 4. Written by lora_dist.\n"


def pictures_of(card: str, directory: Path) -> dict[str, Image.Image]:
    """Returns the pictures that a card shows, by file name."""
    shown = re.findall(r"!\[[^]]*\]\(([^()/]+\.png)\)", card)
    return {name: Image.open(directory / name) for name in shown if (directory / name).is_file()}


def export_legacy_names(
    classifier: Classifier,
    card: str,
    out: Path,
    files: Sequence[str],
    trust_remote_code: bool = False,
    pictures: Mapping[str, Image.Image] = bundle.NO_PICTURES,
) -> None:
    """Writes the active adapter as a bundle that transformers 4 and PEFT from 0.2 on read as well.

    PEFT before 0.5 reads only `adapter_model.bin`, so both formats of weights are written.

    Args:
        classifier: with the adapter.
        card: content of the model card.
        out: new or empty directory.
        files: images to compare logits on; packaged photographs if none is readable.
        trust_remote_code: run code that comes with the base.
        pictures: of the card, by file name.

    Raises:
        UserError: `out` cannot be written, or the exported adapter gives other logits after loading.
    """
    require_free_directory(out, "export_legacy_names")
    transforms = classifier.transforms()
    images = check_images(files, transforms)
    expected = logits(classifier.model, transforms.batch(images))
    adapter = adapters.active_adapter(classifier.model)
    names = LegacyNames.of(adapters.base_of(classifier.model))
    assert classifier.base is not None
    state = _old_keys(adapter.state, names)
    # The config of a base with several adapters has the labels of the first one.
    labelled = copy.deepcopy(adapters.base_of(classifier.model).config)
    labelled.id2label = dict(enumerate(classifier.labels))
    labelled.label2id = {label: index for index, label in enumerate(classifier.labels)}
    with whole_directory(out) as temporary:
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        # Not saved directly: on a full disk, torch.save raises a RuntimeError.
        pickled = io.BytesIO()
        torch.save(state, pickled)
        (temporary / OLD_WEIGHTS).write_bytes(pickled.getbuffer())
        base = demo.local_path(str(classifier.base["model_name_or_path"]))
        content = _config(adapter.config, base, adapter.state, names)
        (temporary / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        records = bundle.Records(classifier.conversion, classifier.calibration, classifier.decision)
        bundle.write_metadata(temporary, labelled, classifier.processor, card, records, pictures, classifier.base)
        require_same_after_loading(temporary, out, "export_legacy_names", images, expected, trust_remote_code)


def _old_keys(state: dict[str, Tensor], names: LegacyNames) -> dict[str, Tensor]:
    adapted = dict.fromkeys(target for target, lora in map(split_lora_name, state) if lora)
    keys: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = PREFIX + names.to_old(name)
        keys[key] = tensor.clone().contiguous()
        module, _, leaf = key.rpartition(".")
        if name.rpartition(".")[0] in adapted:
            # A bias of a LoRA layer. PEFT before 0.6 has no `base_layer`; each release ignores unknown keys.
            keys[f"{module}.base_layer.{leaf}"] = tensor.clone().contiguous()
    return keys


def _config(config: Any, base: str | None, state: dict[str, Tensor], names: LegacyNames) -> dict[str, Any]:
    """Fields that every release knows, and others only if they are set: many releases refuse unknown fields."""
    adapted = dict.fromkeys(target for target, lora in map(split_lora_name, state) if lora)
    if fused := sorted(adapted.keys() - names.modules.keys()):
        raise UserError(
            f"--export_legacy_names: {', '.join(fused[:3])} have no names in transformers 4, whose checkpoints join "
            f"their weights with those of other layers"
        )
    layers = {target: names.modules[target] for target in adapted}
    targets = _targets(layers.values(), names.modules.values()) if layers else sorted(config.target_modules)
    ranks_and_alphas = {old: adapters.rank_and_alpha(config, layer) for layer, old in layers.items()}
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
        "target_modules": targets,
        "task_type": None,
    }
    in_use = {
        "revision": config.revision if base == config.base_model_name_or_path else None,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": {old: rank for old, (rank, _) in ranks_and_alphas.items() if rank != config.r},
        "alpha_pattern": {old: alpha for old, (_, alpha) in ranks_and_alphas.items() if alpha != config.lora_alpha},
    }
    return content | {name: value for name, value in in_use.items() if value}


def _targets(adapted: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Last components of the names if they select nothing else; PEFT 0.2 compares them without a leading dot."""
    wanted = set(adapted)
    last = sorted({name.rpartition(".")[2] for name in wanted})
    return last if {name for name in modules if name.endswith(tuple(last))} == wanted else sorted(wanted)
