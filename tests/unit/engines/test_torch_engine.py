"""What FSDP2 and fp16 loss scaling need, as far as a machine without a GPU shows it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import distributed, nn
from torch.distributed.fsdp import CPUOffloadPolicy

from lora_dist.engines.torch_engine import TorchEngine, leave_frozen_out, offloading, order_for_convolutions, precision
from lora_dist.engines.zero_engine import scaling_of, set_scaling
from lora_dist.model.base.backbone import load_base
from lora_dist.model.lora.trainable import make_trainable
from lora_dist.processes.runtime import launch
from lora_dist.settings.train import LoraSettings, ModelSettings


@pytest.mark.parametrize(("asked", "computing"), [("bf16", torch.bfloat16), ("fp16", torch.float16), (None, None)])
def test_fsdp2_computes_in_half_precision_and_sums_gradients_in_full(
    asked: str | None, computing: torch.dtype | None
) -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    if asked:
        plugin.set_mixed_precision(asked)
    policy = precision(plugin)
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (computing, torch.float32, None)


def test_fsdp2_offloads_to_the_host_from_a_gpu_only() -> None:
    """On a CPU it would page-lock memory, which needs a GPU."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=True)
    on_cpu, on_gpu = (offloading(plugin, torch.device(name)) for name in ("cpu", "cuda"))
    assert (isinstance(on_cpu, CPUOffloadPolicy), isinstance(on_gpu, CPUOffloadPolicy)) == (False, True)


def test_fsdp2_unscales_gradients_once(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's own clipping does so twice, which the scaler refuses."""
    accelerator = engine.accelerator
    monkeypatch.setitem(accelerator.state.__dict__, "distributed_type", DistributedType.FSDP)
    monkeypatch.setitem(accelerator.state.__dict__, "fsdp_plugin", FullyShardedDataParallelPlugin(fsdp_version=2))
    monkeypatch.setitem(accelerator.state.__dict__, "_mixed_precision", "fp16")
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setattr(accelerator, "_models", [])  # The engine shards the model itself.
    parameter = next(engine.unwrapped.parameters())
    before = parameter.detach().clone()
    engine.begin_update(0.1)
    (engine.unwrapped(torch.ones(1, 2)).sum() * accelerator.scaler.scale(torch.ones(()))).backward()
    assert engine.step(engine.clip_gradient(0.5).tolist()) == pytest.approx(6**0.5)
    assert not torch.equal(parameter, before)


@pytest.fixture
def engine() -> TorchEngine:
    """As under fp16, which a CPU cannot train in; the scaler is torch's own."""
    model = nn.Linear(2, 2)
    engine = TorchEngine(launch("no"), model, torch.optim.AdamW(model.parameters()))
    engine.accelerator.scaler = torch.amp.GradScaler("cpu", growth_interval=5)
    return engine


def _zero_scaler(**more: Any) -> Any:
    """DeepSpeed's own."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    return DynamicLossScaler(
        **{"init_scale": 2.0**16, "scale_window": 5, "min_scale": 1.0, "delayed_shift": 1, **more},
        consecutive_hysteresis=False,
    )


def test_the_scale_of_fp16_goes_from_any_engine_to_any_other(engine: TorchEngine) -> None:
    zero, state = _zero_scaler(), {"scale": 512.0, "growth_tracker": 3}
    set_scaling(zero, state)
    assert scaling_of(zero) == state
    engine.load_scaler_state(scaling_of(zero))
    assert engine.scaler_state() == state
    other = _zero_scaler()
    set_scaling(other, engine.scaler_state() or {})
    assert scaling_of(other) == state


def test_updates_since_the_scale_changed_are_counted_alike() -> None:
    zero = _zero_scaler(init_scale=1024.0)
    for good in range(8):
        assert scaling_of(zero) == {"scale": 1024.0 if good < 6 else 2048.0, "growth_tracker": good % 5}
        zero.update_scale(False)


def test_a_count_past_the_interval_does_not_keep_the_scale_from_growing(engine: TorchEngine) -> None:
    engine.load_scaler_state({"scale": 512.0, "growth_tracker": 9})
    assert engine.scaler_state() == {"scale": 512.0, "growth_tracker": 4}


@pytest.mark.parametrize("state", [None, {}, {"cur_scale": 3.0}, {"scale": 3.0}])
def test_a_state_in_another_form_is_left_alone(state: dict[str, Any] | None, engine: TorchEngine) -> None:
    before = engine.scaler_state()
    engine.load_scaler_state(state)
    assert engine.scaler_state() == before
    zero = _zero_scaler()
    set_scaling(zero, state or {})
    assert scaling_of(zero) == {"scale": 2.0**16, "growth_tracker": 0}


def test_ddp_does_not_write_frozen_weights(vit: Path) -> None:
    """Processes of a node share these as pages of the checkpoint."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for start, ignores in (("default", True), ("pissa", False)):
            lora = LoraSettings(lora_r=2, init_lora_weights=start, lora_target_modules=["all-linear"])
            model = make_trainable(load_base(str(vit), ["x", "y"]), ModelSettings(), lora)
            model.register_buffer("frozen_statistics", torch.zeros(1))
            leave_frozen_out(model)
            frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
            frozen |= {name for name, _ in model.named_buffers()}
            ignored = nn.parallel.DistributedDataParallel(model).parameters_to_ignore
            assert ignored == (frozen if ignores else set())
    finally:
        distributed.destroy_process_group()


def _updated(model: nn.Module, engine: TorchEngine, count: int = 2) -> dict[str, torch.Tensor]:
    for _ in range(count):
        engine.begin_update(0.01)
        pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
        model(pixels).square().sum().backward()
        engine.step(engine.clip_gradient(1.0).tolist())
    return engine.trainable_state()


def _convolutions(fused: bool, channels_last: bool = False) -> tuple[nn.Module, TorchEngine]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    if channels_last:
        order_for_convolutions(model)
    return model, TorchEngine(launch("no"), model, torch.optim.AdamW(model.parameters(), fused=fused))


@pytest.mark.parametrize("channels_last", [False, True])
def test_fused_and_plain_adamw_go_on_from_each_others_state(channels_last: bool) -> None:
    """As a run does that changes between CPU and GPU; a CPU has a fused AdamW as well."""
    expected = _updated(*_convolutions(fused=False), count=4)
    for first, second in ((False, True), (True, False), (True, True)):
        model, engine = _convolutions(first, channels_last)
        trained, moments = _updated(model, engine), engine.optimizer_state()
        assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in moments.values())
        model, engine = _convolutions(second, channels_last)
        engine.load_trainable_state(trained)
        engine.load_optimizer_state(moments)
        for name, tensor in _updated(model, engine).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_fused_optimizer_that_skips_an_update_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate does not notice it (1.15)."""
    model, accelerator = nn.Conv2d(3, 4, 3), launch("no")
    accelerator.scaler = torch.amp.GradScaler("cpu")
    engine = TorchEngine(accelerator, model, torch.optim.AdamW(model.parameters(), fused=True))
    monkeypatch.setitem(engine.accelerator.state.__dict__, "_mixed_precision", "fp16")
    monkeypatch.setattr(engine.accelerator, "native_amp", True)
    before = engine.trainable_state()
    for factor, skipped in ((float("inf"), True), (1.0, False)):
        engine.begin_update(0.01)
        (engine.accelerator.scaler.scale(torch.ones(())) * factor * model(torch.ones(1, 3, 8, 8)).sum()).backward()
        engine.step(engine.clip_gradient(1.0).tolist())
        assert engine.was_skipped() == skipped
        assert all(torch.equal(tensor, before[name]) for name, tensor in engine.trainable_state().items()) == skipped


def test_an_update_that_is_dropped_leaves_fp16_ready_for_the_next_one(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.accelerator.state.__dict__, "_mixed_precision", "fp16")
    monkeypatch.setattr(engine.accelerator, "native_amp", True)
    for dropped in (True, False):
        engine.begin_update(0.1)
        (engine.accelerator.scaler.scale(torch.ones(())) * engine.unwrapped(torch.ones(1, 2)).sum()).backward()
        read = engine.clip_gradient(1.0).tolist()
        if dropped:
            assert engine.drop_update()
            assert engine.scaler_state() == {"scale": 2.0**16, "growth_tracker": 0}
        else:
            engine.step(read)


def test_only_convolutional_networks_are_put_into_channels_last_order() -> None:
    convolutional = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    patches = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2))
    pixels = torch.randn(2, 3, 8, 8)
    expected = convolutional(pixels)
    for model in (convolutional, patches):
        order_for_convolutions(model)
    orders = [model[0].weight.is_contiguous(memory_format=torch.channels_last) for model in (convolutional, patches)]
    assert orders == [True, False]
    found = convolutional(pixels)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
