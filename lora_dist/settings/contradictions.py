"""Which settings of a training run cannot go together, and what is named and is not there."""

import stat
from collections.abc import Iterator
from pathlib import Path

from lora_dist.demo import is_packaged
from lora_dist.settings.train import Problem, Settings


def missing_paths(train_dir: str | None, validation_dir: str | None, exclude: str | None) -> Iterator[Problem]:
    """Yields what is named and is not there."""
    for name, path in {"train_dir": train_dir, "validation_dir": validation_dir}.items():
        if path and not is_packaged(path):
            mode, why = _mode(path)
            if not stat.S_ISDIR(mode):
                yield Problem((name,), f"{why or 'no such directory'}: {path}")
    if exclude:
        mode, why = _mode(exclude)
        if not stat.S_ISREG(mode):
            yield Problem(("exclude",), f"{why or 'no such file'}: {exclude}")


def impossible_output(output_dir: str) -> Iterator[Problem]:
    """Yields why nothing can be in a directory, there or not yet, that is named to write to."""
    _, why = _mode(output_dir)
    if why:
        yield Problem(("output_dir",), f"{why}: {output_dir}")


def _mode(path: str) -> tuple[int, str]:
    """What a path is, 0 if it is nothing; and why that cannot be told, such as that its name is too long."""
    try:
        return Path(path).stat().st_mode, ""
    except (FileNotFoundError, NotADirectoryError):
        return 0, ""
    except (OSError, ValueError) as error:
        return 0, (isinstance(error, OSError) and error.strerror) or str(error)


def contradictions(settings: Settings) -> Iterator[Problem]:
    """Yields every combination of settings that cannot work, for the parser to report all at once."""
    model, data, optimization = settings.model, settings.data, settings.optimization
    run, hub = settings.run, settings.hub
    if data.train_dir and data.dataset_name:
        yield Problem(("train_dir", "dataset_name"), "two sources of data: give one of them")
    if not (data.train_dir or data.dataset_name or (run.do_eval_only and data.validation_dir)):
        yield Problem(("train_dir", "dataset_name"), "no data: give a folder of images or the name of a data set")
    if data.validation_dir and data.dataset_name:
        yield Problem(("validation_dir", "dataset_name"), "a data set takes its validation from --validation_split")
    if data.validation_split and data.train_dir:
        yield Problem(("validation_split", "train_dir"), "a folder takes its validation from --validation_dir")
    if data.streaming:
        if data.train_dir:
            yield Problem(("streaming", "train_dir"), "a folder is not streamed: drop one of them")
        elif not data.validation_split:
            yield Problem(("streaming", "validation_split"), "no part of a stream is held out: name a split")
        if data.cache_dir:
            yield Problem(("streaming", "cache_dir"), "a stream is kept nowhere: drop one of them")
        if data.max_train_samples:
            yield Problem(("streaming", "max_train_samples"), "a stream is read whole: bound it by --max_train_steps")
        if "[" in data.train_split or "+" in data.train_split:
            yield Problem(("streaming", "train_split"), "a stream is one whole split, without a slice or sum")
    elif data.streaming_lanes:
        yield Problem(("streaming_lanes", "streaming"), "lanes are for streams: add --streaming")
    if data.exclude and data.dataset_name:
        yield Problem(("exclude", "dataset_name"), "a list of files goes with folders of them")
    yield from missing_paths(data.train_dir, data.validation_dir, data.exclude)
    yield from impossible_output(run.output_dir)
    if settings.augmentation.augment_on_device and settings.augmentation.augmentation != "basic":
        text = "crops and flips are made on the device, and what comes after them in the workers: take basic or drop it"
        yield Problem(("augment_on_device", "augmentation"), text)
    if optimization.warmup_steps and optimization.warmup_ratio:
        yield Problem(("warmup_steps", "warmup_ratio"), "two lengths of warm-up: give one of them")
    if model.init_from_config and model.tuning != "full":
        yield Problem(("init_from_config", "tuning"), "random weights have to be trained: add --tuning full")
    if run.do_eval_only and not model.adapter_name_or_path:
        yield Problem(("do_eval_only", "adapter_name_or_path"), "nothing to evaluate: name the adapter")
    if model.adapter_name_or_path and not run.do_eval_only:
        if model.tuning != "lora":
            yield Problem(("adapter_name_or_path", "tuning"), "an adapter goes on as LoRA: drop one of them")
        if settings.lora.init_lora_weights != "default":
            yield Problem(("adapter_name_or_path", "init_lora_weights"), "an adapter is the start: drop one of them")
    if run.do_eval_only and run.dry_run:
        yield Problem(("dry_run", "do_eval_only"), "a dry run is of a training: drop one of them")
    if run.do_eval_only and run.resume_from_checkpoint:
        yield Problem(("do_eval_only", "resume_from_checkpoint"), "an evaluation has nothing to resume: drop one")
    if optimization.early_stopping_patience and run.eval_steps == "no":
        yield Problem(("early_stopping_patience", "eval_steps"), "early stopping needs evaluations")
    if hub.push_to_hub and run.do_eval_only:
        yield Problem(("push_to_hub", "do_eval_only"), "an evaluation has nothing to push: drop one")
    if (hub.hub_model_id or hub.hub_private_repo) and not hub.push_to_hub:
        yield Problem(("hub_model_id", "hub_private_repo", "push_to_hub"), "nothing is pushed: add --push_to_hub")
