"""Copies the running statistics of trained batch norms before an update, to restore them if it is skipped."""

import torch
from torch import nn

from lora_dist.model.lora.trainable import trained_tensors


class RunningStatistics:
    """A copy of the trained buffers from before an update."""

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: the model without the engine's wrapper.
        """
        self._buffers = [tensor for _, tensor in trained_tensors(model) if not isinstance(tensor, nn.Parameter)]
        self._kept = [buffer.clone() for buffer in self._buffers]

    def keep(self) -> None:
        """Copies the buffers. Called before the first forward pass of an update, and after the update."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the copied buffers, which undoes the forward passes of a skipped update."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            buffer.copy_(kept)
