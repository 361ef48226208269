"""Settings of a benchmark: those of the run that it measures, and its own."""

from collections.abc import Iterator
from typing import Literal

from lora_dist.settings import contradictions as of_runs
from lora_dist.settings.train import Count, Group, Problem, Settings


class Measuring(Group):
    """Benchmark"""

    updates: Count = 10
    """Updates in each measurement, after those that warm up."""
    compare: Literal["trainer"] | None = None
    """trainer: the same training by the PEFT guide's recipe on the Trainer of transformers, in turns with this one."""
    rounds: Count = 5
    """Turns of each (with --compare)."""
    csv: str | None = None
    """Add the figures as a row to this file."""


class BenchSettings(Settings):
    """All settings of a training run, and those of measuring it."""

    measuring: Measuring = Measuring()


def contradictions(settings: BenchSettings) -> Iterator[Problem]:
    """Yields what cannot be trained, measured or compared."""
    yield from of_runs.contradictions(settings)
    for name in ("do_eval_only", "dry_run"):
        if getattr(settings.run, name):
            yield Problem((name,), "there is nothing to measure: drop it")
    if settings.measuring.compare is None:
        return
    augmentation = settings.augmentation
    if settings.model.tuning != "lora" or settings.model.adapter_name_or_path:
        yield Problem(("compare", "tuning", "adapter_name_or_path"), "the guide trains a new LoRA")
    if settings.data.streaming:
        yield Problem(("compare", "streaming"), "the guide's data set is on the disk: drop one of them")
    if settings.optimization.auto_batch_size:
        yield Problem(("compare", "auto_batch_size"), "both are to have one batch: say which")
    if augmentation.augmentation not in ("none", "basic"):
        yield Problem(("compare", "augmentation"), "the guide has none, or basic")
    for group, name in (
        (augmentation, "random_erasing"), (augmentation, "mixup_alpha"), (augmentation, "cutmix_alpha"),
        (settings.lora, "use_dora"),
    ):  # fmt: skip
        if getattr(group, name):
            yield Problem(("compare", name), "the guide has nothing like it: drop one of them")
