"""Loads several adapters on one base: switched by name, or as their weighted sum."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_dist.errors import UserError
from lora_dist.model.base.backbone import Base
from lora_dist.model.lora import adapters
from lora_dist.model.lora.adapters import Adapter
from lora_dist.model.lora.weighted_sum import weighted_sum
from lora_dist.model.trained import infer_metadata
from lora_dist.model.trained.bundle import AdapterBundle, label_map, read_bundle
from lora_dist.model.trained.classifier import Classifier, attach_adapter, load_base_of_bundle
from lora_dist.model.trained.decision import MULTI_LABEL, mean_decision
from lora_dist.model.trained.temperature import UNCALIBRATED

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterSet:
    """Classifiers that share one model; the `classifiers` have names, and one of them is active.

    A single classifier may be any other model.
    """

    classifiers: dict[str, Classifier]

    @property
    def first(self) -> Classifier:
        """The first classifier."""
        return next(iter(self.classifiers.values()))

    @property
    def multi_label(self) -> bool:
        """Whether a classifier has several labels per image."""
        return any(one.decision.problem_type == MULTI_LABEL for one in self.classifiers.values())

    def set_adapter(self, name: str) -> Classifier:
        """Activates an adapter and returns its classifier.

        Raises:
            UserError: there is no adapter of this name.
        """
        if name not in self.classifiers:
            raise UserError(f"there is no adapter {name!r}, only {', '.join(self.classifiers)}")
        if len(self.classifiers) > 1:
            adapters.activate(self.classifiers[name].model, _peft_name(list(self.classifiers).index(name)))
        return self.classifiers[name]


def load_adapter_set(
    directories: Mapping[str, Path],
    base_model: str | None = None,
    trust_remote_code: bool = False,
    labels: Sequence[str] | None = None,
) -> AdapterSet:
    """Loads several adapters, which may have different classes, on one base. Arguments as `load_classifier`.

    Raises:
        UserError: as `load_classifier`, or the adapters have different bases.
    """
    bundles, base = _read(directories, base_model, trust_remote_code, labels)
    classifiers: dict[str, Classifier] = {}
    for index, (name, bundle) in enumerate(bundles.items()):
        # The base's head has the size of the first adapter, so loading does not check the others.
        count = infer_metadata.class_count(bundle.files, adapters.base_of(base.model).config, trust_remote_code)
        if count not in (None, len(bundle.labels)):
            raise UserError(f"{directories[name]} has a head of {count} classes, and names for {len(bundle.labels)}")
        classifiers[name] = attach_adapter(base, bundle, _peft_name(index))
        base = replace(base, model=classifiers[name].model)
    return AdapterSet(classifiers)


def load_weighted_sum(
    directories: Mapping[str, Path],
    weights: Sequence[float],
    base_model: str | None = None,
    trust_remote_code: bool = False,
    labels: Sequence[str] | None = None,
) -> Classifier:
    """Loads the weighted sum of several adapters as one adapter; the `weights` sum to 1. See `load_adapter_set`.

    Raises:
        UserError: as `load_adapter_set` and `weighted_sum`, or classes or processors differ.
    """
    adapter_set = load_adapter_set(directories, base_model, trust_remote_code, labels)
    first = adapter_set.first
    loaded: list[Adapter] = []
    for name, directory in directories.items():
        classifier = adapter_set.set_adapter(name)
        if classifier.labels != first.labels:
            raise UserError(f"{next(iter(directories))} and {name} have different label maps, and cannot be blended")
        prepared = (classifier.processor.to_dict(), classifier.conversion)
        if prepared != (first.processor.to_dict(), first.conversion):
            raise UserError(
                f"{next(iter(directories))} and {name} prepare images differently, and cannot be blended: their "
                f"preprocessor_config.json or conversion.json differs (older releases wrote no conversion.json, "
                f"or one without all_depths: they treat transparency otherwise)"
            )
        if classifier.decision.problem_type != first.decision.problem_type:
            raise UserError(f"{next(iter(directories))} and {name} have different problem types, and cannot be blended")
        loaded.append(replace(adapters.active_adapter(classifier.model), directory=directory))
    blended = adapters.attach_adapter(first.model, weighted_sum(loaded, weights), "blend")
    if any(classifier.calibration != first.calibration for classifier in adapter_set.classifiers.values()):
        logger.warning("the adapters have different temperatures: their weighted sum has none and is not calibrated")
        first = replace(first, calibration=UNCALIBRATED)
    decisions = [classifier.decision for classifier in adapter_set.classifiers.values()]
    return replace(first, model=blended, decision=mean_decision(decisions, weights))


def _peft_name(index: int) -> str:
    """PEFT's name of an adapter, which becomes part of parameter names, where not every character is allowed."""
    return f"adapter_{index}"


def _read(
    directories: Mapping[str, Path], base_model: str | None, trust_remote_code: bool, labels: Sequence[str] | None
) -> tuple[dict[str, AdapterBundle], Base]:
    """Reads all adapters, and the base of the first with a head for its classes."""
    # If all adapters have label maps, `labels` must equal them.
    unnamed = [name for name in directories if label_map(directories[name]) is None] or directories
    bundles = {
        name: read_bundle(directory, base_model, trust_remote_code, labels if name in unnamed else None)
        for name, directory in directories.items()
    }
    first = next(iter(bundles.values()))
    base = load_base_of_bundle(first)
    for bundle in bundles.values():
        # An adapter without a fingerprint can only be compared by name.
        if bundle.fingerprint is None and (bundle.base, bundle.revision) != (first.base, first.revision):
            raise UserError(f"the adapters have different bases: {first.base} and {bundle.base}")
        for what in ("pooling", "image_size"):
            one, other = getattr(first, what), getattr(bundle, what)
            if one != other:
                raise UserError(
                    f"{first.files.directory} and {bundle.files.directory} were trained with a different --{what} "
                    f"({one} and {other}), and cannot share a base; use one at a time"
                )
    return bundles, base
