"""Estimates the disk space of a run, and checks it before training."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lora_dist.errors import UserError
from lora_dist.model.lora.trainable import count_parameters, trained_tensors
from lora_dist.storage.disk import SAFETY, free_bytes, readable


@dataclass(frozen=True)
class Sizes:
    """Bytes that a run writes.

    Attributes:
        checkpoint: one of them.
        result: the adapter, or the model.
        checkpoints: largest number of them at a time: those kept, the best, and the one that is being written.
    """

    checkpoint: int
    result: int
    checkpoints: int

    @property
    def total(self) -> int:
        """Bytes of all of them together."""
        return self.checkpoint * self.checkpoints + self.result

    @classmethod
    def of(cls, model: nn.Module, whole: bool, save_total_limit: int, has_average: bool, moments: int = 2) -> "Sizes":
        """
        Args:
            model: before an engine shards it.
            whole: the result is the whole model.
            save_total_limit: checkpoints to keep, besides the best.
            has_average: checkpoints also have averaged weights.
            moments: tensors that the optimizer keeps for each parameter.
        """
        trained = [(tensor.numel() * 4, isinstance(tensor, nn.Parameter)) for _, tensor in trained_tensors(model)]
        bare = sum(size for size, _ in trained)
        state = sum(moments * size + 4 for size, has_moments in trained if has_moments)
        result = count_parameters(model)[1] * 4 if whole else bare
        return cls(bare + state + has_average * bare, result, save_total_limit + 2)


def require_disk_space(root: Path, sizes: Sizes) -> None:
    """Raises a `UserError` if the disk has no room for a run. Excludes files that the run has already written."""
    there = sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) if root.is_dir() else 0
    needed, free = int(SAFETY * sizes.total) - there, free_bytes(root)
    if needed > free:
        raise UserError(
            f"--output_dir {root}: {readable(free)} free, and this run writes {readable(needed)}: {sizes.checkpoints} "
            f"checkpoints of {readable(sizes.checkpoint)} and a result of {readable(sizes.result)}. Free "
            f"some space, choose another disk, or keep fewer checkpoints with --save_total_limit"
        )
