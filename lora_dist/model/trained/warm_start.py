"""Starts a run from an existing adapter: its matrices, and its head if the classes are the same."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lora_dist.data.pixels.conversion import AS_TRANSFORMERS, Conversion
from lora_dist.errors import UserError
from lora_dist.hub import local_directory
from lora_dist.model.base.backbone import Base, load_base_of_run, report_weights
from lora_dist.model.base.head import class_dimensions, is_in, reordering
from lora_dist.model.base.image_size import resize_processor
from lora_dist.model.lora import adapters
from lora_dist.model.lora.adapter_io import split_lora_name
from lora_dist.model.lora.adapters import Adapter
from lora_dist.model.lora.norms import saves_norms
from lora_dist.model.lora.targets import (
    fitting_pattern,
    pattern_value,
    resolve_pattern,
    resolve_targets,
    selected,
    shortest,
    targets_in,
)
from lora_dist.model.lora.trainable import blocks_of, layers_called
from lora_dist.model.trained.bundle import AdapterBundle, read_bundle
from lora_dist.model.trained.classifier import check_base, own_processor
from lora_dist.settings.train import LoraSettings, ModelSettings, Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmStart:
    """The adapter that a run starts from.

    Attributes:
        adapter: initial weights.
        replaced: parameters that the run initialises instead: the head, if the classes differ.
        permuted: parameters of the head, if the classes have another order.
        conversion: how images became 8-bit RGB when the adapter was trained.
    """

    adapter: Adapter
    replaced: frozenset[str]
    permuted: frozenset[str] = frozenset()
    conversion: Conversion = AS_TRANSFORMERS

    def fingerprint(self) -> str:
        """Returns a digest of the tensors that the run uses as they are."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.adapter.state.items()):
            if name not in self.replaced | self.permuted:
                digest.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def load_into(self, model: nn.Module) -> None:
        """Loads the adapter into a model with LoRA of the same shape.

        Raises:
            UserError: the adapter has tensors that this run does not train.
        """
        fresh = adapters.active_adapter(model).state
        taken = {name: tensor for name, tensor in self.adapter.state.items() if name not in self.replaced}
        kept = {name: tensor for name, tensor in fresh.items() if name in self.replaced}
        adapters.set_adapter_state(model, self.adapter, taken | kept)


def load_warm_start(settings: Settings, labels: Sequence[str]) -> tuple[Settings, Base, WarmStart | None]:
    """Loads the base of a run and the adapter that it starts from, if any.

    Returns:
        The settings, with base and shape of LoRA from the adapter; the base, with the adapter's processor; and the
        warm start.

    Raises:
        UserError: given settings differ from the adapter's, or the adapter was trained on another base.
    """
    if not settings.model.adapter_name_or_path:
        base = load_base_of_run(settings, labels)
        report_weights(base)
        return settings, base, None
    directory = local_directory(settings.model.adapter_name_or_path)
    if not directory.is_dir():
        raise UserError(f"--adapter_name_or_path: no such directory: {directory}")
    given = settings.model.model_name_or_path if "model_name_or_path" in settings.model.model_fields_set else None
    bundle = read_bundle(directory, given, settings.model.trust_remote_code, None)
    settings = settings.model_copy(update={"model": _model_of(bundle, settings.model, given)})
    base = load_base_of_run(settings, labels, processor=own_processor(bundle))
    adapter, processor = check_base(base, bundle)
    # Training may go on at another image size.
    processor = processor if base.image_size is None else resize_processor(processor, base.image_size)
    base = replace(base, processor=processor)
    lora = _lora_of(adapter, base, settings.lora)
    settings = settings.model_copy(update={"lora": lora})
    if bundle.labels == list(labels):
        logger.info("starting from the adapter in %s, with its head", directory)
        return settings, base, WarmStart(adapter, frozenset(), conversion=bundle.conversion)
    head = frozenset(name for name in adapter.state if is_in(name, base.heads))
    if (order := reordering(bundle.labels, labels)) is None:
        logger.info("starting from the adapter in %s, with a new head, because its classes differ", directory)
        return settings, base, WarmStart(adapter, head, conversion=bundle.conversion)
    logger.info("starting from the adapter in %s, with its head permuted to the order of the classes", directory)
    dimensions = class_dimensions(base.model.config, type(base.model))
    state = {
        name: tensor.index_select(dimensions[name], order) if name in dimensions else tensor
        for name, tensor in adapter.state.items()
    }
    return settings, base, WarmStart(replace(adapter, state=state), frozenset(), head, bundle.conversion)


def _model_of(bundle: AdapterBundle, model: ModelSettings, given: str | None) -> ModelSettings:
    """Returns settings with the adapter's base, pooling and, unless another one is given, image size."""
    if "pooling" in model.model_fields_set and model.pooling != bundle.pooling:
        raise UserError(
            f"--pooling is {model.pooling}, and the adapter in {bundle.files.directory} has {bundle.pooling}; leave "
            f"--pooling out"
        )
    found: dict[str, Any] = {"pooling": bundle.pooling}
    if given is None:
        found |= {"model_name_or_path": bundle.base, "model_revision": bundle.revision}
    if "image_size" not in model.model_fields_set:
        found["image_size"] = bundle.image_size and list(bundle.image_size)
    return model.model_copy(update=found)


def _lora_of(adapter: Adapter, base: Base, given: LoraSettings) -> LoraSettings:
    """Returns LoRA settings with the adapter's shape; given settings must equal it."""
    config, directory = adapter.config, adapter.directory
    adapted = sorted({target for target, lora in map(split_lora_name, adapter.state) if lora})
    if not adapted:
        raise UserError(f"the adapter in {directory} has no LoRA matrices to start from")
    shape = {
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_rank_pattern": fitting_pattern(config.rank_pattern, adapted),
        "lora_alpha_pattern": fitting_pattern(config.alpha_pattern, adapted),
        "lora_bias": config.bias,
        "train_norms": saves_norms(config.modules_to_save or (), base.model, base.heads),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }
    problems = [
        f"--{name} is {getattr(given, name)}, and that of the adapter is {value}"
        for name, value in shape.items()
        if name in given.model_fields_set and not _is_same(name, getattr(given, name), value, adapted)
    ]
    if given.model_fields_set & {"lora_target_modules", "layers_to_transform"}:
        wanted = _targets(base, given, adapted)
        if wanted != set(adapted):
            problems.append(
                f"{_selection(given)} selects {len(wanted)} modules, such as {min(wanted)}; the adapter has "
                f"{len(adapted)}, such as {adapted[0]}"
            )
    if problems:
        lines = [f"these settings differ from the adapter in {directory}; leave them out:", *problems]
        raise UserError("\n  ".join(lines))
    targets = shortest(adapted, base.model)
    return given.model_copy(update={**shape, "lora_target_modules": targets, "layers_to_transform": None})


def _is_same(name: str, given: Any, found: Any, adapted: Sequence[str]) -> bool:
    """Whether a setting says the same as the adapter; the layers of a pattern can be named in several ways."""
    if not name.endswith("_pattern"):
        return bool(given == found)
    resolved = resolve_pattern(given, adapted, name)
    return all(pattern_value(resolved, layer) == pattern_value(found, layer) for layer in adapted)


def _selection(given: LoraSettings) -> str:
    """The flags that select modules."""
    blocks = given.layers_to_transform
    flags = {
        "lora_target_modules": ",".join(given.lora_target_modules),
        "layers_to_transform": blocks if isinstance(blocks, str) else ",".join(map(str, blocks or ())),
    }
    return " ".join(f"--{name} {value}" for name, value in flags.items() if name in given.model_fields_set)


def _targets(base: Base, given: LoraSettings, adapted: Sequence[str]) -> set[str]:
    """Full names of the modules that given settings select; targets that are not given are those of the adapter."""
    own = sorted({name.rpartition(".")[2] for name in adapted})
    names = given.lora_target_modules if "lora_target_modules" in given.model_fields_set else own
    targets = resolve_targets(base.model, names, base.heads, layers_called(base))
    if given.layers_to_transform is not None:
        targets = targets_in(targets, blocks_of(base, given.layers_to_transform), base.model)
    return {*selected(targets, base.model)}
