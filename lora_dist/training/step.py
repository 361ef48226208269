"""One optimizer step on the mean loss over all samples, however they are split into micro-batches and processes."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_dist.data.batch import Batch
from lora_dist.data.pixels.transforms import seed_of
from lora_dist.engines.engine import Engine
from lora_dist.errors import NonFiniteGradientError
from lora_dist.training.problems.loss import SampleLoss


class Update(NamedTuple):
    """The results of one update.

    Attributes:
        loss: weighted mean over all samples of the update, on all processes.
        grad_norm: before clipping.
        skipped: whether fp16 loss scaling skipped the update.
        unreadable: number of samples, over all processes, whose image could not be read; `loss` excludes them.
        requests: sums over all processes of the requests that were given to `GradientAccumulator.step`.
        nonfinite: None, or what is not finite, "loss" or "gradient": the weights are then unchanged.
        suspects: dataset rows, on this process, of the samples that may be the cause of that.
    """

    loss: float
    grad_norm: float
    skipped: bool
    unreadable: int
    requests: list[float]
    nonfinite: Literal["loss", "gradient"] | None = None
    suspects: Sequence[int] = ()


class LostBatchError(Exception):
    """A process could not load its data, so no process applied the update: the weights are unchanged.

    Attributes:
        own: the error of this process; None if its data was loaded.
    """

    def __init__(self, own: Exception | None) -> None:
        super().__init__(str(own))
        self.own = own


class BrokenUpdateError(RuntimeError):
    """The optimizer failed while updating the weights, which may now be inconsistent."""


class GradientAccumulator:
    """The gradient of one update: accumulates micro-batches, then makes the optimizer step.

    A sample has its weight / `total_weight`, in micro-batches and processes of any size; dividing by the number
    of micro-batches instead would mis-scale a last, smaller window (transformers#39659). A sample whose image cannot be
    read contributes nothing to the gradient, and the loss weight of the other samples does not change.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        micro_batch_count: int,
        total_weight: float,
        learning_rate: float,
        loss: SampleLoss,
        dropout_seed: tuple[int, ...],
        padding_batch: Callable[[], Batch] | None = None,
        before_exchange: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Args:
            engine: engine whose model is in training mode.
            micro_batch_count: micro-batches of this process, the same number on every process.
            total_weight: weights of the samples over all micro-batches and processes: their number, without class
                weights.
            dropout_seed: seed of the dropout masks of this update.
            padding_batch: returns a micro-batch with weight 0 to replace one that could not be loaded; None to raise
                loading errors at once.
            before_exchange: called before the last backward pass, which reduces the gradients over processes.
        """
        self._engine = engine
        self._micro_batch_count = micro_batch_count
        self._total_weight = total_weight
        self._loss_function = loss
        self._dropout_seed = dropout_seed
        self._padding_batch = padding_batch
        self._before_exchange = before_exchange
        self._failure: Exception | None = None
        self._skips = False
        self._suspects: list[tuple[Tensor, Tensor]] = []
        self._loss = self._unreadable = self._weight = torch.zeros((), device=engine.accelerator.device)
        engine.begin_update(learning_rate)

    def loaded(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches of this update from `stream`, on the device.

        After a loading error padding follows, so that all processes make the same collective calls; `step` raises it.
        """
        for _ in range(self._micro_batch_count):
            batch = None
            if self._failure is None:
                try:
                    batch = next(stream)
                except Exception as error:
                    if self._padding_batch is None:
                        raise
                    self._failure = error
            if batch is None:
                assert self._padding_batch is not None
                batch = self._padding_batch()
            yield batch.to(self._engine.accelerator.device)

    def backward(self, batch: Batch) -> None:
        """Runs the forward and backward pass of the next micro-batch; the last one reduces the gradients."""
        engine, index = self._engine, len(self._suspects)
        torch.manual_seed(seed_of((*self._dropout_seed, index, engine.accelerator.process_index)))
        last = index == self._micro_batch_count - 1
        with engine.micro_batch(last):
            logits = engine.model(pixel_values=batch.pixel_values).logits.float()
            losses = self._loss_function.of_samples(logits, batch)
            if last:
                self._before_exchange()
            engine.backward(losses.sum() / self._total_weight)
        self._loss = self._loss + losses.detach().sum()
        if batch.unreadable is not None:
            self._skips = True
            self._unreadable = self._unreadable + batch.unreadable.sum()
            weights = self._loss_function.weights_of(batch.labels, batch.partner_labels, batch.shares)
            self._weight = self._weight + (weights * batch.weights).sum()
        self._suspects.append((batch.indices, losses.detach()))

    def step(self, max_grad_norm: float, requests: Sequence[bool] = ()) -> Update:
        """Clips the gradient and makes the optimizer step, if the loss and the gradient are finite.

        All that the host needs to know is read from the device at once, because each read waits for the device.

        Args:
            max_grad_norm: maximum norm of the gradient; 0 for no clipping.
            requests: of this process, to be summed over all processes; the same number on each.

        Raises:
            LostBatchError: on every process, if a micro-batch failed to load on any of them; the weights are unchanged.
            BrokenUpdateError: the optimizer failed while updating the weights.
        """
        engine = self._engine
        # Not `tensor`, whose copy would wait for the device.
        flags = [
            torch.full((), float(flag), device=self._loss.device) for flag in (self._failure is not None, *requests)
        ]
        sums = engine.accelerator.reduce(torch.stack([self._loss, self._unreadable, self._weight, *flags]), "sum")
        read = torch.cat([sums, engine.clip_gradient(max_grad_norm)]).tolist()
        (loss_sum, left_out, weight, lost_batches, *requested), clipped = read[: len(sums)], read[len(sums) :]
        if lost_batches:
            raise LostBatchError(self._failure)
        unreadable = int(left_out)
        # The mean over the images that could be read; 0 without any.
        weight = weight if self._skips else self._total_weight
        loss = loss_sum / weight if weight else 0.0
        if not math.isfinite(loss):
            found = [int(index) for indices, seen in self._suspects for index in indices[~seen.isfinite()]]
            return Update(loss, math.nan, False, unreadable, requested, "loss", found)
        try:
            grad_norm = engine.step(clipped)
        except NonFiniteGradientError:
            found = [int(index) for indices, _ in self._suspects for index in indices]
            return Update(loss, math.nan, False, unreadable, requested, "gradient", found)
        except Exception as error:
            raise BrokenUpdateError(str(error)) from error
        return Update(loss, grad_norm, engine.was_skipped(), unreadable, requested)


def make_update(gradient: GradientAccumulator, stream: Iterator[Batch], max_grad_norm: float) -> Update:
    """Makes a whole update with the next micro-batches of `stream`. Raises the errors of `GradientAccumulator.step`."""
    for batch in gradient.loaded(stream):
        gradient.backward(batch)
    return gradient.step(max_grad_norm)
