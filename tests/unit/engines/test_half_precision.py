"""Models whose parameters are cast to bf16 without autocast, as DeepSpeed and FSDP2 do."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from lora_dist_testing.tiny import ARCHITECTURES, make_config
from transformers import AutoModelForImageClassification, PreTrainedModel

from lora_dist.engines.engine import unsharded
from lora_dist.engines.half_precision import compute_in


def _model(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(make_config(architecture))


def _pixels(architecture: str) -> torch.Tensor:
    size = 64 if architecture == "mobilevit" else 32
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_computes_with_parameters_in_bf16(architecture: str) -> None:
    """Pixels are passed in fp32 and by keyword, and nobody casts buffers."""
    model, pixels = _model(architecture), _pixels(architecture)
    with torch.no_grad():
        expected = model.eval()(pixel_values=pixels).logits
    compute_in(model, "bf16")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    # The weights of the tiny MobileViT are large, and so are its errors.
    tolerance = 0.25 if architecture == "mobilevit" else 0.05
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    model.train()(pixel_values=pixels).logits.float().square().sum().backward()
    used = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert used
    assert all(gradient.isfinite().all() for gradient in used)


def test_running_statistics_stay_in_fp32_and_are_those_of_fp32() -> None:
    models, pixels = [_model("resnet").train() for _ in range(2)], _pixels("resnet")
    compute_in(models[1], "bf16")
    for parameter in models[1].parameters():
        parameter.data = parameter.data.bfloat16()
    for model in models:
        model(pixel_values=pixels)
    expected, found = (dict(model.named_buffers()) for model in models)
    assert expected.keys() == found.keys()
    for name, buffer in found.items():
        assert buffer.dtype == expected[name].dtype, name
        torch.testing.assert_close(buffer, expected[name], rtol=0.05, atol=0.05)
    assert int(found["resnet.embedder.embedder.normalization.num_batches_tracked"]) == 1


def test_in_fp32_nothing_changes() -> None:
    model, pixels = _model("resnet").eval(), _pixels("resnet")
    expected = model(pixel_values=pixels).logits
    compute_in(model, "no")
    assert torch.equal(model(pixel_values=pixels).logits, expected)


@pytest.mark.parametrize("engine", [DistributedType.NO, DistributedType.DEEPSPEED])
def test_one_process_computes_in_the_precision_of_the_engine(engine: DistributedType) -> None:
    """For the check of the written result, and for --do_eval_only, which ignored the precision."""
    launched = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16", distributed_type=engine)
    accelerator, pixels = cast(Accelerator, launched), _pixels("resnet")
    with torch.no_grad():
        logits = unsharded(accelerator, _model("resnet").eval())(pixel_values=pixels).logits
    assert logits.dtype == torch.bfloat16
