"""What FSDP2 and fp16 loss scaling need, as far as a machine without a GPU shows it."""

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin

from lora_dist.torch_engine import precision


@pytest.mark.parametrize(("asked", "computing"), [("bf16", torch.bfloat16), ("fp16", torch.float16), (None, None)])
def test_fsdp2_computes_in_half_precision_and_sums_gradients_in_full(
    asked: str | None, computing: torch.dtype | None
) -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    if asked:
        plugin.set_mixed_precision(asked)
    policy = precision(plugin)
    assert (policy.param_dtype, policy.reduce_dtype) == (computing, torch.float32)
