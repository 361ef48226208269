"""With what precision the logits of a written model are compared."""

import torch

from lora_dist.model.trained.parity import without_tf32


def test_tf32_is_off_for_a_comparison_and_as_before_after_it() -> None:
    """cuDNN's convolutions use it by default: a ResNet-50 would be off by twenty times the tolerance."""

    def allowed() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = allowed()
    assert before[0]
    with without_tf32():
        assert allowed() == (False, False)
    assert allowed() == before
