"""A run that goes on from an adapter: with its matrices, and its head where the classes are the same."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from lora_dist.errors import UserError
from lora_dist.hub import local_directory
from lora_dist.model import adapters, bundle
from lora_dist.model.adapter_io import split_lora_name
from lora_dist.model.adapters import Adapter
from lora_dist.model.backbone import Base, load_base_of
from lora_dist.model.classifier import check_base
from lora_dist.model.targets import resolve_targets, shortest
from lora_dist.settings.train import LoraSettings, Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmStart:
    """What a run starts from, beside its base.

    Attributes:
        adapter: to go on from.
        replaced: parameters of the adapter that the run makes anew: its head, where the classes are others.
    """

    adapter: Adapter
    replaced: frozenset[str]

    def fingerprint(self) -> str:
        """Digest of what the run takes over."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.adapter.state.items()):
            if name not in self.replaced:
                digest.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def load_into(self, model: nn.Module) -> None:
        """Puts the adapter into a model that was made trainable with its shape of LoRA.

        Raises:
            UserError: the adapter brings something that this run does not train.
        """
        fresh = adapters.active_adapter(model).state
        taken = {name: tensor for name, tensor in self.adapter.state.items() if name not in self.replaced}
        kept = {name: tensor for name, tensor in fresh.items() if name in self.replaced}
        adapters.set_adapter_state(model, self.adapter, taken | kept)


def load_warm_start(settings: Settings, labels: Sequence[str]) -> tuple[Settings, Base, WarmStart | None]:
    """The base of a run and the adapter that it goes on from, if any.

    Args:
        settings: as given.
        labels: class names of the run's data, in order.

    Returns:
        The settings, with base and shape of LoRA taken from the adapter; the base, with the processor that the adapter
        was trained with; and the start.

    Raises:
        UserError: settings that were given differ from the adapter's, or the base is another one.
    """
    if not settings.model.adapter_name_or_path:
        return settings, load_base_of(settings, labels), None
    directory = local_directory(settings.model.adapter_name_or_path)
    if not directory.is_dir():
        raise UserError(f"--adapter_name_or_path: no such directory: {directory}")
    given = settings.model.model_name_or_path if "model_name_or_path" in settings.model.model_fields_set else None
    origin = bundle.read_origin(directory, given, settings.model.trust_remote_code, None)
    if given is None:
        found = {"model_name_or_path": origin.base, "model_revision": origin.revision}
        settings = settings.model_copy(update={"model": settings.model.model_copy(update=found)})
    base = load_base_of(settings, labels)
    adapter, processor = check_base(base, directory, origin)
    base = replace(base, processor=processor)
    lora = _lora_of(adapter, base, settings.lora)
    same_classes = origin.labels == list(labels)
    heads = tuple(f"{head}." for head in base.heads)
    replaced = () if same_classes else (name for name in adapter.state if name.startswith(heads))
    logger.info(
        "going on from the adapter in %s; %s",
        directory,
        "its head goes on as well" if same_classes else "its classes are others, so the head is new",
    )
    return settings.model_copy(update={"lora": lora}), base, WarmStart(adapter, frozenset(replaced))


def _lora_of(adapter: Adapter, base: Base, given: LoraSettings) -> LoraSettings:
    """The settings of LoRA with the adapter's shape; what the user gave must be the same."""
    config, directory = adapter.config, adapter.directory
    adapted = sorted({target for target, lora in map(split_lora_name, adapter.state) if lora})
    if not adapted:
        raise UserError(f"the adapter in {directory} has no LoRA matrices to go on from")
    if config.rank_pattern or config.alpha_pattern:
        raise UserError(f"the adapter in {directory} has ranks or scales that differ by module; a run has one")
    shape = {
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }
    problems = [
        f"--{name} is {getattr(given, name)}, and the adapter has {value}"
        for name, value in shape.items()
        if name in given.model_fields_set and getattr(given, name) != value
    ]
    if "lora_target_modules" in given.model_fields_set:
        wanted = _targets(base, given.lora_target_modules)
        if wanted != set(adapted):
            problems.append(
                f"--lora_target_modules {','.join(given.lora_target_modules)} means {len(wanted)} modules, such as "
                f"{min(wanted)}, and the adapter has {len(adapted)}, such as {adapted[0]}"
            )
    if problems:
        lines = [f"these settings are not those of the adapter in {directory}; leave them out:", *problems]
        raise UserError("\n  ".join(lines))
    return given.model_copy(update={**shape, "lora_target_modules": shortest(adapted, base.model)})


def _targets(base: Base, names: Sequence[str]) -> set[str]:
    """Full names of the modules that these targets stand for."""
    targets = resolve_targets(base.model, names, base.heads)
    return {
        module
        for module, _ in base.model.named_modules()
        if any(module == target or module.endswith(f".{target}") for target in targets)
    }
