"""The exponential moving average of the trained weights, which is evaluated and saved instead of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from lora_dist.engines.engine import Engine, broadcast_statistics
from lora_dist.processes.preemption import StopRequested
from lora_dist.training.evaluation import NothingToEvaluateError


class WeightAverage:
    """The exponential moving average (EMA) of the trained weights, on the CPU. Call its methods on every process.

    The decay of update `t` (from 0) is min(decay, (1 + t) / (10 + t)), so that a short run forgets its initial weights.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        """
        Args:
            engine: whose weights are averaged; the average starts with the current ones.
            decay: share of the average that an update keeps.
        """
        self._engine = engine
        self._decay = decay
        self._average = engine.trainable_state()

    def update(self, step: int) -> None:
        """Adds the weights after update `step` (from 0)."""
        share = 1.0 - min(self._decay, (1 + step) / (10 + step))
        for name, tensor in self._engine.trainable_state().items():
            average = self._average[name]
            # The counters of batch norms are integers.
            average.lerp_(tensor, share) if average.is_floating_point() else average.copy_(tensor)

    def state(self) -> dict[str, Tensor]:
        """Returns a copy of the averaged tensors by name."""
        return {name: tensor.clone() for name, tensor in self._average.items()}

    def load_state(self, average: Mapping[str, Tensor]) -> None:
        """Replaces the average."""
        self._average = {name: tensor.clone() for name, tensor in average.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the average into the model while the block runs.

        If one of several processes fails, the trained weights are not restored: the others would wait for it.
        """
        trained = self._engine.trainable_state()
        self._engine.load_trainable_state(self._average)
        broadcast_statistics(self._engine)
        try:
            yield
        except Exception as error:
            known_to_all = isinstance(error, StopRequested | NothingToEvaluateError)
            if known_to_all or self._engine.accelerator.num_processes == 1:
                self._engine.load_trainable_state(trained)
            raise
        self._engine.load_trainable_state(trained)
