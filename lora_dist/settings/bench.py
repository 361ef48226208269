"""Settings of a benchmark, in addition to those of the run that it measures."""

from collections.abc import Iterator
from typing import Literal

from lora_dist.settings import train, train_contradictions
from lora_dist.settings.fields import SINGLE_LABEL, Contradiction, Count, Group


class BenchmarkSettings(Group):
    """Benchmark"""

    updates: Count = 10
    """Updates per measurement, after the warmup."""
    compare: Literal["trainer"] | None = None
    """trainer: also measure the recipe of the PEFT guide on transformers.Trainer, alternating with this trainer."""
    rounds: Count = 5
    """Measurements of each trainer (with --compare)."""
    csv: str | None = None
    """CSV file to append the results to."""


class BenchSettings(train.Settings):
    """All settings of a benchmark, by group."""

    benchmark: BenchmarkSettings = BenchmarkSettings()


def contradictions(settings: BenchSettings) -> Iterator[Contradiction]:
    """Yields every combination of settings that cannot work."""
    yield from train_contradictions.contradictions(settings)
    for name in ("do_eval_only", "dry_run"):
        if getattr(settings.run, name):
            yield Contradiction((name,), "it leaves nothing to measure: remove it")
    if settings.benchmark.compare is None:
        return
    augmentation = settings.augmentation
    if settings.model.tuning != "lora" or settings.model.adapter_name_or_path:
        yield Contradiction(("compare", "tuning", "adapter_name_or_path"), "the PEFT guide trains a new LoRA adapter")
    if settings.data.problem_type != SINGLE_LABEL:
        yield Contradiction(("compare", "problem_type"), "the PEFT guide has one class per image: remove one of them")
    if settings.data.streaming:
        yield Contradiction(("compare", "streaming"), "the PEFT guide does not stream: remove one of them")
    if settings.optimization.auto_batch_size:
        yield Contradiction(("compare", "auto_batch_size"), "both trainers need the same batch size: set it")
    if augmentation.augmentation not in ("none", "basic"):
        yield Contradiction(("compare", "augmentation"), "the PEFT guide supports only none and basic")
    for group, name in (
        (augmentation, "random_erasing"),
        (augmentation, "mixup_alpha"),
        (augmentation, "cutmix_alpha"),
        (settings.lora, "use_dora"),
        (settings.optimization, "focal_gamma"),
        (settings.data, "balanced_sampling"),
        (settings.run, "deterministic"),
    ):
        if getattr(group, name):
            yield Contradiction(("compare", name), "the PEFT guide does not support it: remove one of them")
    if settings.model.base_dtype != "float32":
        yield Contradiction(("compare", "base_dtype"), "the PEFT guide does not support it: remove one of them")
    if settings.optimization.class_weights != "none":
        yield Contradiction(("compare", "class_weights"), "the PEFT guide does not support it: remove one of them")
