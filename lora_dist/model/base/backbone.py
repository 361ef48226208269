"""Loads the base model of a classifier."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig

from lora_dist import demo, hub_client
from lora_dist.data.pixels.transforms import output_size
from lora_dist.errors import UserError
from lora_dist.model.base.classifier_config import classifier_config, prefixes_to_remove
from lora_dist.model.base.drop_path import restore_rate, with_rate
from lora_dist.model.base.head import find_heads, fingerprint, fit_head, is_in, require_same_layers
from lora_dist.model.base.image_size import configured_size, resize_model, resize_processor
from lora_dist.model.base.initial_values import marked_memory, require_values
from lora_dist.model.base.input_check import require_fit
from lora_dist.model.base.load_errors import cannot_load, loading_errors
from lora_dist.model.base.model_files import require_content, weight_files
from lora_dist.settings.fields import SINGLE_LABEL
from lora_dist.settings.train import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A base model as loaded.

    Attributes:
        model: a `transformers` classifier in fp32, with a head for the labels.
        processor: image processor.
        heads: names of the modules to train in full (see `head.find_heads`).
        missing: parameters that the checkpoint lacked or had in another shape; they are random.
        unused: weights of the checkpoint that the model does not have.
        name: path or Hub name.
        revision: commit on the Hub; None for a directory.
        fingerprint: digest of the backbone's weights.
        pooling: features of a linear head on a backbone (see `classifier_config`); None for a model with its own head.
        image_size: height and width of the images, if they are not those of the checkpoint.
    """

    model: Any
    processor: Any
    heads: list[str]
    missing: list[str]
    unused: list[str]
    name: str
    revision: str | None
    fingerprint: str
    pooling: str | None = None
    image_size: tuple[int, int] | None = None

    def identity(self) -> dict[str, Any]:
        """Returns the record of this base for an adapter bundle."""
        recorded = {"model_name_or_path": self.name, "revision": self.revision, "fingerprint": self.fingerprint}
        changes = {"pooling": self.pooling, "image_size": self.image_size and list(self.image_size)}
        return recorded | {name: value for name, value in changes.items() if value is not None}


@dataclass(frozen=True)
class BaseOptions:
    """Options for loading a base model.

    Attributes:
        revision: branch, tag or commit on the Hub.
        seed: for weights that the checkpoint lacks, such as a new head.
        init_from_config: initialise all weights at random.
        trust_remote_code: run code that comes with the model.
        fit_classes: permute or renew the head of a base that names its classes (see `head.fit_head`).
        pooling: features for a linear head (see `classifier_config`).
        image_size: height and width of the images; None for those of the checkpoint.
        processor: image processor; None for that of the base.
        problem_type: that of the labels, for `pipeline`.
        drop_path: rate of stochastic depth in training; None for that of the checkpoint.
    """

    revision: str | None = None
    seed: int = 0
    init_from_config: bool = False
    trust_remote_code: bool = False
    fit_classes: bool = False
    pooling: str | None = None
    image_size: tuple[int, int] | None = None
    processor: Any = None
    problem_type: str = SINGLE_LABEL
    drop_path: float | None = None

    @property
    def source(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that say which files to read."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


DEFAULTS = BaseOptions()


def load_base(name: str, labels: Sequence[str], options: BaseOptions = DEFAULTS) -> Base:
    """Loads a base model in fp32 with a head for `labels`, and its processor.

    Args:
        name: Hub name, local directory, or a packaged model.
        labels: class names in order.
        options: how it is loaded.

    Raises:
        UserError: the model is not found, is not an image classifier, or cannot take images of this size.
    """
    place, drop_path = demo.local_path(name), options.drop_path
    torch.manual_seed(options.seed)
    with (
        loading_errors(name, place, drop_path),
        hub_client.reading(f"the base model {name}", f"`hf download {name}`"),
    ):
        config = read_config(place, **options.source)
        _require_whole_weights(config)
        processor = options.processor or AutoImageProcessor.from_pretrained(place, **options.source)
        _require_pair(config, options)
        image_size = _changed_size(config, processor, options)
        old_labels = dict(config.id2label or {})
        config = _with_labels(config, labels, options, processor, image_size)
        rate = None if drop_path is None else with_rate(config, drop_path)
        made = _random(config, options) if options.init_from_config else _pretrained(place, config, options)
    model, missing, unused = made
    random = list(missing)
    if options.fit_classes and not options.init_from_config:
        torch.manual_seed(options.seed)
        random += fit_head(model, old_labels, labels, missing)
    heads = find_heads(model, random)
    # Taken before resizing, so that it is that of the checkpoint.
    identity = fingerprint(model, heads)
    if image_size is not None:
        model, processor = resize_model(model, image_size), resize_processor(processor, image_size)
    if drop_path is not None:
        restore_rate(model, rate, drop_path)
    require_fit(model, processor)
    return Base(
        model=model,
        processor=processor,
        heads=heads,
        missing=missing,
        unused=unused,
        name=name,
        revision=getattr(config, "_commit_hash", None),
        fingerprint=identity,
        pooling=getattr(model.config, "pooling", None),
        image_size=image_size,
    )


def _changed_size(config: Any, processor: Any, options: BaseOptions) -> tuple[int, int] | None:
    """Returns the size of the options; None if the checkpoint has it already."""
    size = options.image_size
    is_own = options.processor is None and size == output_size(processor) and configured_size(config) in (None, size)
    return None if is_own else size


def _with_labels(
    config: Any, labels: Sequence[str], options: BaseOptions, processor: Any, image_size: tuple[int, int] | None
) -> Any:
    """Returns the configuration of a classifier of `labels`."""
    # An adapter's processor makes images of another size, if it was trained with --image_size.
    size = (image_size and configured_size(config)) or output_size(processor)
    config = classifier_config(config, options.pooling, size)
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    # The base may have another problem type.
    config.problem_type = options.problem_type
    return config


def _require_pair(config: Any, options: BaseOptions) -> None:
    """Raises a `ValueError` if a processor is given that timm's configuration would replace when a result is read."""
    processor = options.processor
    if processor is None or "timm" not in {config.model_type.partition("_")[0], _kind(processor)}:
        return
    if config.model_type != "timm_wrapper":
        raise ValueError("--image_processor_name: timm's image processors fit timm's models only")
    own = AutoImageProcessor.from_pretrained(config.name_or_path, **options.source)
    size = {} if options.image_size is None else {"input_size": None}
    if _kind(processor) != "timm" or {**processor.data_config, **size} != {**own.data_config, **size}:
        raise ValueError("timm's models have their own image processor: leave --image_processor_name out")


def _require_whole_weights(config: Any) -> None:
    """Raises a `ValueError` if the weights are quantized: LoRA could not be merged into them exactly."""
    if getattr(config, "quantization_config", None):
        raise ValueError("its weights are quantized; take the checkpoint from before the quantization")


def _kind(processor: Any) -> str:
    return "timm" if type(processor).__name__ == "TimmWrapperImageProcessor" else "transformers"


def read_processor(name: str | Path, trust_remote_code: bool) -> Any:
    """Reads an image processor from a directory or the Hub.

    Raises:
        UserError: it is missing or damaged, or needs a package.
    """
    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise cannot_load(str(name), error) from error
    except (OSError, ValueError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise cannot_load(str(name), error) from error
        raise UserError(f"{name}/preprocessor_config.json is missing or damaged: {error}") from error


def read_config(name: str, **source: Any) -> Any:
    """Reads the configuration of a model of transformers or timm. Arguments as `AutoConfig.from_pretrained`.

    Raises:
        ValueError: its label map is none; other errors are those of `transformers`.
    """
    try:
        config = AutoConfig.from_pretrained(name, **source)
    except (AttributeError, TypeError, ValueError) as error:
        found = PreTrainedConfig.get_config_dict(name, **source)[0].get("id2label")
        if found and not (isinstance(found, dict) and all(str(number).isdecimal() for number in found)):
            raise ValueError(
                'the label map (id2label) in its config.json does not map numbers to names: write it as {"0": "first '
                'class", "1": "second class", …}, or remove it'
            ) from error
        raise
    # timm saves it with the other arguments, and `transformers` would pass it a second time.
    (getattr(config, "model_args", None) or {}).pop("num_classes", None)
    return config


def load_base_of_run(
    settings: Settings,
    labels: Sequence[str],
    revision: str | None = None,
    fit_classes: bool = True,
    processor: Any = None,
) -> Base:
    """Loads the base of a training run's settings.

    `revision` and `processor` override theirs, to load the same commit again, or for an adapter that has a processor.
    """
    given = settings.model.image_processor_name
    if processor is None and given is not None:
        processor = read_processor(demo.local_path(given), settings.model.trust_remote_code)
    options = BaseOptions(
        revision=revision or settings.model.model_revision,
        seed=settings.run.seed,
        init_from_config=settings.model.init_from_config,
        trust_remote_code=settings.model.trust_remote_code,
        fit_classes=fit_classes,
        pooling=settings.model.pooling,
        image_size=settings.model.input_size,
        processor=processor,
        problem_type=settings.data.problem_type,
        drop_path=settings.model.drop_path,
    )
    return load_base(settings.model.model_name_or_path, labels, options)


def report_weights(base: Base) -> None:
    """Says which weights of a base are random besides its head, and which ones of its checkpoint it does not use."""
    head = find_heads(base.model) if base.missing else []
    if random := [name for name in base.missing if not is_in(name, head)]:
        logger.warning(
            "the checkpoint of %s lacks %s, or has them in another shape: these weights are random, and train in full "
            "if the logits depend on them",
            base.name,
            _first_of(random),
        )
    if base.unused:
        logger.info("the model does not use all weights of %s: %s", base.name, _first_of(base.unused))


def _first_of(names: Sequence[str]) -> str:
    """The first of some names, with the number of the others."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} others" if len(names) > 3 else shown


def _random(config: Any, options: BaseOptions) -> tuple[Any, list[str], list[str]]:
    config.architectures = config.architectures or []
    remote = options.trust_remote_code
    return AutoModelForImageClassification.from_config(config, dtype=torch.float32, trust_remote_code=remote), [], []


def _pretrained(name: str, config: Any, options: BaseOptions) -> tuple[Any, list[str], list[str]]:
    """The model, and the names of weights that are missing or of another shape, and of those that it does not have.

    Raises:
        UserError: as `require_same_layers`, `require_content` and `require_values`.
    """
    for file in weight_files(Path(name)):
        require_content(file)
    renamed = prefixes_to_remove(config)
    with marked_memory():
        model, loading = AutoModelForImageClassification.from_pretrained(
            name,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
            key_mapping=renamed,
            **options.source,
        )
    if renamed:
        # `save_pretrained` would put the prefix back, where loading does not look for it.
        model._weight_conversions = [
            one for one in model._weight_conversions if not {*one.source_patterns} & {*renamed}
        ]
    missing = sorted({*loading["missing_keys"], *(mismatch[0] for mismatch in loading["mismatched_keys"])})
    unused = sorted(loading["unexpected_keys"])
    require_same_layers(model, sorted(loading["missing_keys"]), unused)
    require_values(model, missing)
    return model, missing, unused
