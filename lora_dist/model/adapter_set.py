"""Several adapters on one base that is loaded once: chosen by name, or blended into one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_dist.errors import UserError
from lora_dist.model import adapter_io, adapters, bundle, infer_metadata
from lora_dist.model.adapters import Adapter
from lora_dist.model.backbone import Base, load_base
from lora_dist.model.bundle import Origin
from lora_dist.model.classifier import Classifier, attach_adapter
from lora_dist.model.weighted_sum import weighted_sum


@dataclass(frozen=True)
class AdapterSet:
    """Classifiers that share one model, of which one is active.

    Attributes:
        classifiers: by the name of their adapter, each with its own labels and processor.
    """

    classifiers: dict[str, Classifier]

    def set_adapter(self, name: str) -> Classifier:
        """Makes an adapter the active one, without loading anything, and returns its classifier.

        Raises:
            UserError: there is no adapter of this name.
        """
        if name not in self.classifiers:
            raise UserError(f"no adapter is called {name!r}; there are {', '.join(self.classifiers)}")
        adapters.activate(self.classifiers[name].model, _inner(list(self.classifiers).index(name)))
        return self.classifiers[name]


def _inner(index: int) -> str:
    """PEFT's name of an adapter: it goes into names of parameters, where not every text may stand."""
    return f"adapter_{index}"


def load_adapter_set(
    directories: Mapping[str, Path],
    base_model: str | None = None,
    trust_remote_code: bool = False,
    labels: Sequence[str] | None = None,
) -> AdapterSet:
    """Loads one base and puts several adapters on it; they may have different classes.

    Args:
        directories: of the adapters, by a name for each.
        base_model: where the base is now, if not where the first adapter says.
        trust_remote_code: run code that comes with the base.
        labels: class names of adapters without a label map.

    Raises:
        UserError: as of `classifier.load_classifier`; among others where the base of one is not that of another.
    """
    origins, base = _load(directories, base_model, trust_remote_code, labels)
    classifiers: dict[str, Classifier] = {}
    for index, (name, origin) in enumerate(origins.items()):
        # The base's head is of the first adapter's size, and cannot tell whether another one is right.
        count = infer_metadata.class_count(
            adapter_io.read(directories[name]), adapters.base_of(base.model).config, trust_remote_code
        )
        if count not in (None, len(origin.labels)):
            raise UserError(f"{directories[name]} has a head of {count} classes, and names {len(origin.labels)}")
        classifiers[name] = attach_adapter(base, directories[name], origin, _inner(index))
        base = replace(base, model=classifiers[name].model)
    return AdapterSet(classifiers)


def load_weighted_sum(
    directories: Mapping[str, Path],
    weights: Sequence[float],
    base_model: str | None = None,
    trust_remote_code: bool = False,
    labels: Sequence[str] | None = None,
) -> Classifier:
    """Loads one base with the weighted sum of several adapters on it, as one adapter.

    Args:
        directories: of the adapters, by a name for each.
        weights: of the adapters, in order; they add up to 1.
        base_model: where the base is now, if not where the first adapter says.
        trust_remote_code: run code that comes with the base.
        labels: class names of adapters without a label map.

    Raises:
        UserError: as of `load_adapter_set` and `weighted_sum`, or where classes or processors differ.
    """
    several = load_adapter_set(directories, base_model, trust_remote_code, labels)
    first = next(iter(several.classifiers.values()))
    read: list[Adapter] = []
    for name, directory in directories.items():
        classifier = several.set_adapter(name)
        if classifier.labels != first.labels:
            raise UserError(f"{next(iter(directories))} and {name} have different label maps, and cannot be blended")
        if classifier.processor.to_dict() != first.processor.to_dict():
            raise UserError(f"{next(iter(directories))} and {name} prepare images differently, and cannot be blended")
        read.append(replace(adapters.active_adapter(classifier.model), directory=directory))
    return replace(first, model=adapters.attach_adapter(first.model, weighted_sum(read, weights), "blend"))


def _load(
    directories: Mapping[str, Path], base_model: str | None, trust_remote_code: bool, labels: Sequence[str] | None
) -> tuple[dict[str, Origin], Base]:
    """What each adapter belongs to, and the base of the first, with a head for the classes of the first."""
    for directory in directories.values():
        adapter_io.require_adapter(directory)
    # Where all have label maps, the one that is given is compared with them.
    unnamed = [name for name in directories if bundle.label_map(directories[name]) is None] or directories
    origins = {
        name: bundle.read_origin(directory, base_model, trust_remote_code, labels if name in unnamed else None)
        for name, directory in directories.items()
    }
    first = next(iter(origins.values()))
    base = load_base(first.base, first.labels, revision=first.revision, trust_remote_code=trust_remote_code)
    for origin in origins.values():
        # Those without a fingerprint can only be asked by name.
        if origin.fingerprint is None and (origin.base, origin.revision) != (first.base, first.revision):
            raise UserError(f"an adapter is for the base {origin.base}, and another one for {first.base}")
    return origins, base
