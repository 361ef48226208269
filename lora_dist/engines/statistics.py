"""The running statistics of batch norms that train: forward passes change them, before any update is made."""

import torch
from torch import nn

from lora_dist.model.trainable import trained_tensors


class RunningStatistics:
    """The buffers of what trains, as they were before an update."""

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: as the engine has it, without its wrapper.
        """
        self._buffers = [tensor for _, tensor in trained_tensors(model) if not isinstance(tensor, nn.Parameter)]
        self._kept = [buffer.clone() for buffer in self._buffers]

    def keep(self) -> None:
        """Remembers them; called before the first forward pass of an update, and once the update is made."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts back what was remembered: undoes the forward passes of an update that is not to be made."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            buffer.copy_(kept)
