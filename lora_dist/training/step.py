"""One exact update: the gradient of the mean loss over its samples, however they are split."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_dist.data.batch import Batch
from lora_dist.data.pixels.transforms import seed_of
from lora_dist.engines.engine import Engine


class Update(NamedTuple):
    """What one update did.

    Attributes:
        loss: mean over all its samples, on all processes.
        grad_norm: before clipping.
        skipped: whether fp16 loss scaling left the update out.
        unreadable: samples, on all processes, whose image could not be read; the loss is the mean over the others.
    """

    loss: float
    grad_norm: float
    skipped: bool
    unreadable: int


class NonFiniteLossError(Exception):
    """The loss or gradient of an update is not finite.

    Attributes:
        what: of them.
        indices: rows of the samples that may be why, on this process.
        unreadable: as in `Update`.
    """

    def __init__(self, what: str, indices: list[int], unreadable: int) -> None:
        super().__init__(what)
        self.what = what
        self.indices = indices
        self.unreadable = unreadable


class LostBatchError(Exception):
    """A process could not get its data, so none made the update: everything is as it was before.

    Attributes:
        own: the error of this process; None where it had its data.
    """

    def __init__(self, own: Exception | None) -> None:
        super().__init__(str(own))
        self.own = own


class BrokenUpdateError(RuntimeError):
    """The optimizer failed while it changed the weights: their state is in doubt."""


def batch_loss(logits: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """Weighted cross-entropy of each sample, shape [B], towards both labels of mixed images."""
    own = cross_entropy(logits, batch.labels, reduction="none", label_smoothing=label_smoothing)
    if batch.partner_labels is not None and batch.shares is not None:
        partner = cross_entropy(logits, batch.partner_labels, reduction="none", label_smoothing=label_smoothing)
        own = batch.shares * own + (1 - batch.shares) * partner
    return own * batch.weights


def train_step(
    engine: Engine,
    micro_batches: Iterable[Batch],
    *,
    micro_batch_count: int,
    sample_count: int,
    learning_rate: float,
    max_grad_norm: float,
    label_smoothing: float,
    dropout_seed: tuple[int, ...],
    padding_batch: Callable[[], Batch] | None = None,
    before_exchange: Callable[[], object] = lambda: None,
) -> Update:
    """One update whose gradient is that of the mean loss over its samples, however they are split.

    Every sample counts 1 / `sample_count`, over micro-batches and processes of any size; dividing by the number
    of micro-batches instead would mis-scale a last, smaller window (transformers#39659). A sample whose image cannot be
    read adds nothing to the gradient, and changes nothing in what the others add.

    Args:
        engine: its model in training mode.
        micro_batches: this process's share.
        micro_batch_count: their number, the same on every process.
        sample_count: samples over all micro-batches and processes.
        learning_rate: of this update.
        max_grad_norm: bound on the gradient's norm; 0 for none.
        label_smoothing: share of the target spread over all classes.
        dropout_seed: decides the dropout of this update.
        padding_batch: makes a micro-batch of no weight, in place of what could not be loaded; None where errors of
            `micro_batches` are to be raised as they are.
        before_exchange: called before the last backward pass, in which processes wait for each other.

    Raises:
        NonFiniteLossError: before the update is made.
        LostBatchError: on every process, before the update is made, where `micro_batches` of any of them fails.
        BrokenUpdateError: while it is made.
    """
    accelerator = engine.accelerator
    device = accelerator.device
    engine.begin_update(learning_rate)
    total, unreadable = torch.zeros((), device=device), torch.zeros((), device=device)
    suspects: list[tuple[Tensor, Tensor]] = []
    stream, failure = iter(micro_batches), None
    for index in range(micro_batch_count):
        batch, failure = _next(stream, padding_batch, failure)
        batch = batch.to(device)
        torch.manual_seed(seed_of((*dropout_seed, index, accelerator.process_index)))
        last = index == micro_batch_count - 1
        with engine.micro_batch(last):
            losses = batch_loss(engine.model(pixel_values=batch.pixel_values).logits.float(), batch, label_smoothing)
            if last:
                before_exchange()
            engine.backward(losses.sum() / sample_count)
        total += losses.detach().sum()
        if batch.unreadable is not None:
            unreadable += batch.unreadable.sum()
        suspects.append((batch.indices, losses.detach()))
    lost = torch.tensor(float(failure is not None), device=device)
    loss_sum, left_out, lost_batches = accelerator.reduce(torch.stack([total, unreadable, lost]), "sum").tolist()
    if lost_batches:
        raise LostBatchError(failure)
    # Where nothing could be read, the loss of nothing is 0.
    loss, left_out = loss_sum / max(1, sample_count - left_out), int(left_out)
    if not math.isfinite(loss):
        found = [int(row) for rows, seen in suspects for row in rows[~seen.isfinite()]]
        raise NonFiniteLossError("loss", found, left_out)
    try:
        grad_norm = engine.step(max_grad_norm)
    except ArithmeticError as error:
        raise NonFiniteLossError("gradient", [int(row) for rows, _ in suspects for row in rows], left_out) from error
    except Exception as error:
        raise BrokenUpdateError(str(error)) from error
    return Update(loss, grad_norm, engine.was_skipped(), left_out)


def _next(
    stream: Iterator[Batch], padding_batch: Callable[[], Batch] | None, failure: Exception | None
) -> tuple[Batch, Exception | None]:
    """The next micro-batch, and the error of the first one that failed; fillers follow, to keep processes in step."""
    if padding_batch is None:
        return next(stream), None
    if failure is None:
        try:
            return next(stream), None
        except Exception as error:
            failure = error
    return padding_batch(), failure
