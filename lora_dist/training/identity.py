"""The identity of a run: saved in its checkpoints, and compared when the run is resumed."""

import json
import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from lora_dist.data.pixels.conversion import Conversion
from lora_dist.data.sampling.order import BatchPlan
from lora_dist.data.sources.load import ImageData
from lora_dist.data.sources.split import Split
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import Base
from lora_dist.model.trained.warm_start import WarmStart
from lora_dist.settings.fields import SINGLE_LABEL, color_name, color_of
from lora_dist.settings.train import DataSettings, Settings
from lora_dist.training.problems.class_weights import describe_weights
from lora_dist.training.saving.checkpoint import Checkpoint
from lora_dist.training.saving.output import Output, read_settings

logger = logging.getLogger(__name__)

TARGETS = "lora_target_modules"
_LATER: dict[str, Any] = {
    "lora_rank_pattern": {},
    "lora_alpha_pattern": {},
    "layers_to_transform": None,
    "train_norms": False,
}
LORA = ("lora_r", "lora_alpha", TARGETS, "lora_bias", "use_rslora", "use_dora", "init_lora_weights", *_LATER)
"""Settings that decide the shapes of the trained tensors and what the model computes with them."""
_BEFORE = {
    "class_weights": "none",
    "focal_gamma": 0.0,
    "problem_type": SINGLE_LABEL,
    "base_dtype": "float32",
    "optim": "adamw_torch",
    "fold": None,
    **_LATER,
}
"""Values of these entries for checkpoints of releases that did not record them."""
MODEL = ("pooling", "image_size")
"""Settings that decide how the base is loaded."""
BASE = ("model_name_or_path", "model_revision")
"""Settings that say where the base is. They are no part of the identity, since a base may move."""
_BOOKKEEPING = {
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "image_processor_type",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "processor_class",
    "return_dict",
    "transformers_version",
}
"""Entries of a model's configuration and processor that do not change what the model computes."""
_DECIDED_BY = {
    "effective_batch": "--per_device_train_batch_size x --gradient_accumulation_steps x processes",
    "train_data": "images and labels, --exclude, and what is held out: --train_val_split, --validation_dir, --seed",
    "processor": "see --image_processor_name",
}
"""The settings that decide an entry which is not named after one, by the part of its name before the first dot."""
_SHOWN = 5
"""Classes that an error names."""


def identity_of(
    settings: Settings,
    base: Base,
    start: WarmStart | None,
    data: ImageData,
    plan: BatchPlan,
    conversion: Conversion,
) -> dict[str, Any]:
    """Returns the facts that a checkpoint and a run resumed from it must share, as JSON values.

    Besides the data and the sample order, this is everything that gives the trained tensors their meaning: the base's
    weights, configuration and processor, the conversion of images, the classes in order, and LoRA's settings.
    """
    tuning = settings.model.tuning
    return {
        "base": base.fingerprint,
        "start": start.fingerprint() if start is not None else None,
        "tuning": tuning,
        "pooling": base.pooling,
        "image_size": base.image_size and list(base.image_size),
        "base_dtype": settings.model.base_dtype,
        "seed": settings.run.seed,
        "ema_decay": settings.optimization.ema_decay,
        "optim": settings.optimization.optim,
        "effective_batch": plan.effective_batch,
        "fold": data.fold,
        "train_data": data.train.fingerprint(),
        "order": plan.sample_order.description,
        "problem_type": settings.data.problem_type,
        "classes": list(data.labels),
        "conversion": conversion.record(),
        "class_weights": describe_weights(settings.optimization.class_weights),
        "focal_gamma": settings.optimization.focal_gamma,
        **({name: getattr(settings.lora, name) for name in LORA} if tuning == "lora" else {}),
        **_entries("config", base.model.config.to_json_string(use_diff=False)),
        **_entries("processor", base.processor.to_json_string()),
    }


def _entries(kind: str, content: str) -> dict[str, Any]:
    return {f"{kind}.{name}": value for name, value in _without_bookkeeping(json.loads(content)).items()}


def _without_bookkeeping(content: Any) -> Any:
    """The entries of a configuration, and of those inside it, that change what the model computes."""
    if not isinstance(content, dict):
        return content
    kept = {name: value for name, value in content.items() if name not in _BOOKKEEPING and not name.startswith("_")}
    return {name: _without_bookkeeping(value) for name, value in kept.items()}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yields one line for each difference between the identity in a checkpoint and that of a run.

    Skips entries that an older release did not save. Skips the target modules too, because the same modules can be
    named in several ways; `Checkpointer.restore` compares the trained tensors instead.
    """
    # A processor leaves entries out that are not set.
    unset = {name: None for name in saved if name.startswith("processor.") and saved[name] and name not in now}
    for name, value in {**now, **unset}.items():
        # Checkpoints of older releases have all entries of inner configurations.
        before = _without_bookkeeping(saved.get(name, _BEFORE.get(name, value)))
        if before == value or name == TARGETS:
            continue
        if name == "classes" and len(before) == len(value):
            changed = ((number, *names) for number, names in enumerate(zip(before, value, strict=True)))
            for number, old, new in islice((one for one in changed if one[1] != one[2]), _SHOWN):
                yield f"class {number} was {old} and is now {new}"
        else:
            decided_by = _DECIDED_BY.get(name.partition(".")[0])
            yield f"{name} was {before} and is now {value}" + (f" ({decided_by})" if decided_by else "")
            if name == "train_data" and "conversion" not in saved:
                yield (
                    "the checkpoint is from an older release, which read fewer kinds of files and selected other "
                    "samples for --max_train_samples: with such data it cannot be resumed, start a new run"
                )


def as_resumed(settings: Settings, resumed: Checkpoint | None) -> Settings:
    """Returns the settings of a resumed run. Settings of the model that were not given are taken from the checkpoint.

    With --adapter_name_or_path they come from the adapter instead.

    Raises:
        UserError: a setting was given and differs from that of the checkpoint.
    """
    if resumed is None or settings.model.adapter_name_or_path:
        return settings
    given = settings.model.model_fields_set | settings.lora.model_fields_set
    values = {**settings.model.model_dump(include={"tuning", *BASE, *MODEL}), **settings.lora.model_dump()}
    taken, problems = {}, []
    saved = _saved_settings(resumed)
    if "model_name_or_path" not in given:
        saved |= {name: value for name, value in settings_of_run(resumed).items() if name in BASE}
    for name, before in saved.items():
        if before == values[name]:
            continue
        if name not in given:
            taken[name] = before
        elif name != TARGETS:
            problems.append(f"--{name} is {_words(values[name])}, but the checkpoint has {_words(before)}")
    if problems:
        lines = ["these settings differ from those of the run to resume; remove them:", *problems]
        raise UserError("\n  ".join(lines) + "\nTo use other settings, start a new run in another --output_dir.")
    if taken:
        flags = (f"--{name} {_words(value)}" for name, value in taken.items())
        logger.info("settings taken from the checkpoint: %s", ", ".join(flags))
    of_model = {name: taken.pop(name) for name in ("tuning", *BASE, *MODEL) if name in taken}
    model = settings.model.model_copy(update=of_model)
    return settings.model_copy(update={"model": model, "lora": settings.lora.model_copy(update=taken)})


def conversion_of(
    settings: DataSettings, data: ImageData, start: WarmStart | None, resumed: Checkpoint | None
) -> Conversion:
    """Returns the conversion of images of a run: from its checkpoint, its initial adapter, or its settings.

    Checkpoints of older releases ignore transparency and have no range; adapters of older releases ignore transparency.

    Raises:
        UserError: a setting was given and differs from that of the checkpoint.
    """
    given: dict[str, Any] = {}
    if "transparent_background" in settings.model_fields_set:
        given["transparent_background"] = color_of(settings.transparent_background)
    if settings.pixel_range is not None:
        given["pixel_range"] = (settings.pixel_range[0], settings.pixel_range[1])
    if resumed is not None:
        saved = resumed.state["identity"].get("conversion")
        before = Conversion.of(saved or {})
        problems = [
            f"--{name} is {value}, but the checkpoint has {getattr(before, name)}"
            for name, value in given.items()
            if getattr(before, name) != value
        ]
        if problems:
            lines = ["these settings differ from those of the run to resume; remove them:", *problems]
            raise UserError("\n  ".join(lines))
        if saved is None:
            logger.info("the checkpoint is from an older release: transparency is ignored, as in that release")
        return before
    if start is not None and start.conversion == Conversion():
        logger.info("the adapter ignores transparency; --transparent_background changes that")
    found = Conversion(color_of(settings.transparent_background)) if start is None else start.conversion
    found = found._replace(**given)
    recorded = None if start is None else start.conversion.transparent_background
    if found.transparent_background not in (None, recorded):
        found = found._replace(all_depths=True)
    if found.pixel_range is None:
        # A stream has no random access.
        limits = (data.train if isinstance(data.train, Split) else data.validation).pixel_range(found)
        if limits is not None:
            logger.info("images of more than 8 bits: %g to %g become 0 to 255; see --pixel_range", *limits)
        found = found._replace(pixel_range=limits)
    return found


def with_conversion(settings: Settings, conversion: Conversion) -> Settings:
    """Returns the settings with a conversion, for the record of the run."""
    limits = conversion.pixel_range
    values = {
        "transparent_background": color_name(conversion.transparent_background),
        "pixel_range": None if limits is None else list(limits),
    }
    return settings.model_copy(update={"data": settings.data.model_copy(update=values)})


def with_pooling(settings: Settings, base: Base) -> Settings:
    """Returns the settings with the pooling that was chosen for the base, for the record of the run."""
    return settings.model_copy(update={"model": settings.model.model_copy(update={"pooling": base.pooling})})


def _saved_settings(resumed: Checkpoint) -> dict[str, Any]:
    """Returns the settings of the model in a checkpoint; LoRA's of an older release from the config.yaml of its run."""
    saved: Mapping[str, Any] = resumed.state["identity"]
    found = {name: saved[name] for name in ("tuning", *MODEL) if name in saved}
    if saved["tuning"] == "lora":
        if "lora_r" not in saved:
            saved = settings_of_run(resumed) or saved
        found.update({name: saved[name] for name in LORA if name in saved})
    return found


def settings_of_run(resumed: Checkpoint | None) -> Mapping[str, Any]:
    """Returns the settings in the `config.yaml` of the checkpoint's run; empty if there is none."""
    if resumed is None or resumed.directory is None:
        return {}
    return read_settings(Output(resumed.directory.absolute().parents[1]).config)


def _words(value: Any) -> str:
    """A value of a setting as on the command line."""
    if isinstance(value, dict):
        return ",".join(f"{name}={number}" for name, number in value.items())
    if not isinstance(value, list):
        return str(value)
    return (" " if all(isinstance(part, int) for part in value) else ",").join(map(str, value))
