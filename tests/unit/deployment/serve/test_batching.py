"""Dynamic batching: each request gets its own answer, and waiting requests share a batch."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ViTImageProcessor

from lora_dist.deployment.serve.batching import Batcher
from lora_dist.errors import UserError
from lora_dist.model.trained.adapter_set import AdapterSet
from lora_dist.model.trained.classifier import Classifier

COLORS = ["red", "lime", "blue"]


class Slow(nn.Module):
    """Logits are the mean red, green and blue, once the test allows; black images raise, and white ones overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.started = threading.Event()
        self.may_go = threading.Event()

    def forward(self, pixel_values: Tensor) -> Any:
        self.sizes.append(len(pixel_values))
        self.started.set()
        assert self.may_go.wait(30)
        if bool((pixel_values == -1).all(dim=(1, 2, 3)).any()):
            raise ValueError("too dark")
        if bool((pixel_values == 1).all(dim=(1, 2, 3)).any()):
            pixel_values = pixel_values / 0
        return SimpleNamespace(logits=10 * pixel_values.mean(dim=(2, 3)))


def _batcher(max_batch_size: int = 4) -> tuple[Batcher, Slow]:
    model = Slow()
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    served = AdapterSet({"model": Classifier(model, processor, COLORS)})
    return Batcher(served, max_batch_size, torch.device("cpu")), model


def _ask(batcher: Batcher, color: str) -> Any:
    return batcher.submit("model", batcher.transforms["model"].resized([Image.new("RGB", (9, 7), color)]))


def test_images_that_arrive_while_the_model_runs_share_the_next_batch() -> None:
    batcher, model = _batcher()
    futures = [_ask(batcher, "red")]
    assert model.started.wait(30)
    futures += [_ask(batcher, COLORS[number % 3]) for number in range(1, 10)]
    model.may_go.set()
    answers = [future.result(30) for future in futures]
    assert [COLORS[int(answer.argmax())] for answer in answers] == [COLORS[number % 3] for number in range(10)]
    assert all(float(answer.sum()) == pytest.approx(1) for answer in answers)
    assert model.sizes == [1, 4, 4, 1]
    batcher.close()


def test_an_error_of_the_model_reaches_only_its_batch() -> None:
    batcher, model = _batcher()
    model.may_go.set()
    with pytest.raises(ValueError, match="too dark"):
        _ask(batcher, "black").result(30)
    assert int(_ask(batcher, "blue").result(30).argmax()) == 2
    batcher.close()


def test_logits_that_are_not_finite_are_an_error() -> None:
    batcher, model = _batcher()
    model.may_go.set()
    with pytest.raises(UserError, match="are not finite"):
        _ask(batcher, "white").result(30)
    assert int(_ask(batcher, "blue").result(30).argmax()) == 2
    batcher.close()


def test_cancelled_images_are_not_computed() -> None:
    batcher, model = _batcher()
    first = _ask(batcher, "red")
    assert model.started.wait(30)
    cancelled, kept = _ask(batcher, "black"), _ask(batcher, "lime")
    assert cancelled.cancel()
    model.may_go.set()
    assert int(kept.result(30).argmax()) == 1
    assert int(first.result(30).argmax()) == 0
    assert model.sizes == [1, 1]
    batcher.close()


def test_close_answers_submitted_images() -> None:
    batcher, model = _batcher(max_batch_size=2)
    futures = [_ask(batcher, "blue") for _ in range(5)]
    model.may_go.set()
    batcher.close()
    assert [int(future.result(0).argmax()) for future in futures] == [2] * 5
