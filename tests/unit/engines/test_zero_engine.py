"""Settings that a DeepSpeed configuration may contain, and those that are refused."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from accelerate import Accelerator

from lora_dist.engines.zero_engine import configure_deepspeed
from lora_dist.errors import UserError
from lora_dist.settings.train import OptimizationSettings


def _accelerator(**config: Any) -> Accelerator:
    """Has what the function reads: the configuration as accelerate keeps it."""
    whole = {"zero_optimization": {"stage": 2}} | config
    plugin = SimpleNamespace(deepspeed_config=whole, zero_stage=whole["zero_optimization"]["stage"])
    return cast("Accelerator", SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), num_processes=2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "ZeRO stage 0: set 1, 2 or 3"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps: 8, but --gradient_accumulation_steps makes"),
        ({"train_micro_batch_size_per_gpu": 1}, "gpu: 1, but --per_device_train_batch_size makes it 128"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer: remove it"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: remove it"),
    ],
)
def test_a_configuration_that_contradicts_the_settings_is_refused(config: dict[str, Any], message: str) -> None:
    """Without ZeRO, the optimizer holds no shards, and nothing could be saved."""
    with pytest.raises(UserError, match=message):
        configure_deepspeed(_accelerator(**config), OptimizationSettings())


def test_values_that_are_left_open_come_from_the_settings() -> None:
    accelerator = _accelerator(train_batch_size="auto", gradient_clipping="auto", gradient_accumulation_steps=4)
    configure_deepspeed(accelerator, OptimizationSettings())
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    assert (config["train_batch_size"], config["gradient_clipping"]) == (128 * 4 * 2, 1.0)
