"""Concurrent requests through the model: each gets its own answer, and those who wait are answered together."""

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
from lora_dist.model.classifier import Classifier

COLORS = ["red", "lime", "blue"]


class Slow(nn.Module):
    """How red, green and blue an image is, when the test lets it; black images break it, and white ones overflow."""

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


def _batcher(largest: int = 4) -> tuple[Batcher, Slow]:
    model = Slow()
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    return Batcher(Classifier(model, processor, COLORS), largest, torch.device("cpu")), model


def _ask(batcher: Batcher, color: str) -> Any:
    return batcher.submit(batcher.transforms.resized([Image.new("RGB", (9, 7), color)]))


def test_what_comes_in_while_the_model_runs_runs_next_together() -> None:
    batcher, model = _batcher()
    promises = [_ask(batcher, "red")]
    assert model.started.wait(30)
    promises += [_ask(batcher, COLORS[number % 3]) for number in range(1, 10)]
    model.may_go.set()
    answers = [promise.result(30) for promise in promises]
    assert [COLORS[int(answer.argmax())] for answer in answers] == [COLORS[number % 3] for number in range(10)]
    assert all(float(answer.sum()) == pytest.approx(1) for answer in answers)
    assert model.sizes == [1, 4, 4, 1]
    batcher.close()


def test_an_error_of_the_model_reaches_those_who_asked_and_nobody_else() -> None:
    batcher, model = _batcher()
    model.may_go.set()
    with pytest.raises(ValueError, match="too dark"):
        _ask(batcher, "black").result(30)
    assert int(_ask(batcher, "blue").result(30).argmax()) == 2
    batcher.close()


def test_logits_that_are_not_finite_are_no_answer() -> None:
    batcher, model = _batcher()
    model.may_go.set()
    with pytest.raises(UserError, match="are not finite"):
        _ask(batcher, "white").result(30)
    assert int(_ask(batcher, "blue").result(30).argmax()) == 2
    batcher.close()


def test_what_was_given_up_is_not_computed() -> None:
    batcher, model = _batcher()
    first = _ask(batcher, "red")
    assert model.started.wait(30)
    given_up, kept = _ask(batcher, "black"), _ask(batcher, "lime")
    assert given_up.cancel()
    model.may_go.set()
    assert int(kept.result(30).argmax()) == 1
    assert int(first.result(30).argmax()) == 0
    assert model.sizes == [1, 1]
    batcher.close()


def test_closing_answers_what_was_asked_before() -> None:
    batcher, model = _batcher(largest=2)
    promises = [_ask(batcher, "blue") for _ in range(5)]
    model.may_go.set()
    batcher.close()
    assert [int(promise.result(0).argmax()) for promise in promises] == [2] * 5
