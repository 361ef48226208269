"""One sentence: what bounds a run, and which of its settings would help."""

from collections.abc import Iterator
from typing import NamedTuple

from lora_dist.bench.measure import Figures
from lora_dist.settings.cli import flat_fields
from lora_dist.settings.train import Settings

WAITING = 0.05
"""Share of an update from which on waiting for data is what to look at first."""
EXCHANGING = 0.2
"""The same for what is neither forward nor backward."""
NEAR = 0.6
"""Share of the speed of matrix products that is near the limit of the hardware."""
AHEAD = 2.0
"""Times the rate of the step at which a loader bounds nothing: on a CPU the two wait for each other's cores."""


class Circumstances(NamedTuple):
    """What else decides which settings can help.

    Attributes:
        device: its type.
        precision: as accelerate names it.
        processes: of the launch.
        workers: of the loader of a process.
        idle_cores: of a process's share of its node.
    """

    device: str
    precision: str
    processes: int
    workers: int
    idle_cores: int


def diagnose(figures: Figures, settings: Settings, found: Circumstances) -> str:
    """What bounds the run, and what would help."""
    behind = figures.loader_images_per_second < AHEAD * figures.step_images_per_second
    if behind and figures.data_wait >= WAITING:
        bound = f"The loader bounds this run: {figures.data_wait:.0%} of an update is waiting for data"
        advice, otherwise = _faster_loading(settings, found), "no core is idle; smaller image files would help"
    elif found.processes > 1 and figures.exchange is not None and figures.exchange >= EXCHANGING:
        bound = f"The exchange of gradients bounds this run: {figures.exchange:.0%} of a step is not computing"
        advice, otherwise = _fewer_exchanges(settings), ""
    else:
        what = "Arithmetic" if figures.mfu >= NEAR else "The step"
        bound = f"{what} bounds this run: it reaches {figures.mfu:.0%} of the speed of matrix products"
        advice, otherwise = _faster_steps(settings, found, figures.mfu), "no setting makes it faster; more processes do"
    remedies = list(advice)
    return f"{bound}; {' or '.join(remedies) + ' may help' if remedies else otherwise}."


def flag(name: str) -> str:
    """A setting as one gives it on the command line; raises `ValueError` if there is none of this name."""
    if name not in flat_fields(Settings):
        raise ValueError(f"no setting {name}")
    return f"--{name}"


def _faster_loading(settings: Settings, found: Circumstances) -> Iterator[str]:
    if not (settings.data.cache_dir or settings.data.streaming):
        yield flag("cache_dir")
    augmentation = settings.augmentation
    if found.device != "cpu" and augmentation.augmentation == "basic" and not augmentation.augment_on_device:
        yield flag("augment_on_device")
    if found.idle_cores > 0:
        yield f"{flag('dataloader_num_workers')} {found.workers + found.idle_cores} (now {found.workers})"


def _fewer_exchanges(settings: Settings) -> Iterator[str]:
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        yield f"a larger {flag(name)} (now {getattr(settings.optimization, name)})"


def _faster_steps(settings: Settings, found: Circumstances, mfu: float) -> Iterator[str]:
    if found.device != "cpu" and found.precision == "no":
        yield f"{flag('mixed_precision')} bf16"
    if settings.model.gradient_checkpointing:
        yield f"no {flag('gradient_checkpointing')}"
    # On a CPU compiled steps are slower: 0.7 of the speed with DINOv2-S on two cores.
    if mfu < NEAR and found.device != "cpu" and not settings.model.torch_compile:
        yield flag("torch_compile")
    if mfu < NEAR and found.device != "cpu":
        yield f"a larger {flag('per_device_train_batch_size')}"
