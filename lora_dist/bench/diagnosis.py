"""Names the bottleneck of a run and the settings that may help."""

from collections.abc import Iterator
from typing import NamedTuple

from lora_dist.bench.measure import Measurements
from lora_dist.settings.train import Settings

HIGH_DATA_WAIT = 0.05
"""If waiting for data takes this fraction of an update, it is the bottleneck."""
HIGH_COMMUNICATION = 0.2
"""If this fraction of a step is spent outside of forward and backward, communication is the bottleneck."""
HIGH_MFU = 0.6
"""At this fraction of the speed of matrix products, a run is near the limit of the hardware."""
FAST_LOADER = 2.0
"""If the loader alone is this many times as fast as the step alone, it is no bottleneck. On a CPU, they share cores."""


class Hardware(NamedTuple):
    """Hardware of a launch. `device` is a device type; `workers` and `idle_cores` count per process."""

    device: str
    precision: str
    processes: int
    workers: int
    idle_cores: int


def diagnose(measured: Measurements, settings: Settings, hardware: Hardware) -> str:
    """Returns one sentence: the bottleneck, and settings that may help."""
    slow_loader = measured.loader_images_per_second < FAST_LOADER * measured.step_images_per_second
    if slow_loader and measured.data_wait >= HIGH_DATA_WAIT:
        bottleneck = f"the data loader ({measured.data_wait:.0%} of an update is spent waiting for data)"
        advice = [*_faster_loading(settings, hardware)]
        otherwise = "no core is idle; smaller image files would help"
    elif hardware.processes > 1 and measured.exchange is not None and measured.exchange >= HIGH_COMMUNICATION:
        bottleneck = f"communication ({measured.exchange:.0%} of a step is spent outside of forward and backward)"
        advice, otherwise = [*_less_communication(settings)], ""
    else:
        what = "computation" if measured.mfu >= HIGH_MFU else "the step"
        bottleneck = f"{what} (it reaches {measured.mfu:.0%} of the speed of matrix products)"
        advice = [*_faster_steps(settings, hardware, measured.mfu)]
        otherwise = "no setting makes it faster; more processes do"
    return f"Bottleneck: {bottleneck}; {' or '.join(advice) + ' may help' if advice else otherwise}."


def _faster_loading(settings: Settings, hardware: Hardware) -> Iterator[str]:
    if not (settings.data.cache_dir or settings.data.streaming):
        yield "--cache_dir"
    augmentation = settings.augmentation
    if hardware.device != "cpu" and augmentation.augmentation == "basic" and not augmentation.augment_on_device:
        yield "--augment_on_device"
    if hardware.idle_cores > 0:
        more = hardware.workers + hardware.idle_cores
        yield f"--dataloader_num_workers {more} (now {hardware.workers})"


def _less_communication(settings: Settings) -> Iterator[str]:
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        yield f"a larger --{name} (now {getattr(settings.optimization, name)})"


def _faster_steps(settings: Settings, hardware: Hardware, mfu: float) -> Iterator[str]:
    if hardware.device != "cpu" and hardware.precision == "no":
        yield "--mixed_precision bf16"
    if settings.model.gradient_checkpointing:
        yield "no --gradient_checkpointing"
    # Compiled steps are slower on a CPU: 0.7x with DINOv2-S on two cores.
    if mfu < HIGH_MFU and hardware.device != "cpu":
        if not settings.model.torch_compile:
            yield "--torch_compile"
        yield "a larger --per_device_train_batch_size"
