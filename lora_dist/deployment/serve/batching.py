"""Dynamic batching: images that arrive while the model runs form the next batch. Explanations come one by one."""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.deployment.explain import overlays
from lora_dist.model.classifier import Classifier


class _Request(NamedTuple):
    pixels: Tensor
    future: Future[Any]
    explains: bool = False


class Batcher:
    """Runs the model in a thread, without waiting for a batch to fill up."""

    def __init__(self, classifier: Classifier, max_batch_size: int, device: torch.device) -> None:
        self.transforms = ImageTransforms(classifier.processor, conversion=classifier.conversion)
        classifier.model.to(device)
        self._classifier = classifier
        self._device = device
        self._max_batch_size = max_batch_size
        self._queue: SimpleQueue[_Request | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, pixels: Tensor) -> Future[Tensor]:
        """Queues an image [1, 3, H, W] from `ImageTransforms.resized`; the future gives probabilities [classes]."""
        future: Future[Tensor] = Future()
        self._queue.put(_Request(pixels, future))
        return future

    def explain(self, pixels: Tensor) -> Future[Image.Image]:
        """Queues an image as `submit`; the future gives it with a heat map (see `overlays`)."""
        future: Future[Image.Image] = Future()
        self._queue.put(_Request(pixels, future, explains=True))
        return future

    def close(self) -> None:
        """Stops the thread after all submitted images are classified."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        last = False
        while not last:
            taken = [self._queue.get()]
            while taken[-1] is not None and len(taken) < self._max_batch_size:
                try:
                    taken.append(self._queue.get_nowait())
                except Empty:
                    break
            last = taken[-1] is None
            # Skips requests that were cancelled.
            waiting = [one for one in taken if one is not None and one.future.set_running_or_notify_cancel()]
            batch = [one for one in waiting if not one.explains]
            if batch:
                self._answer(batch, self._probabilities)
            for one in waiting:
                if one.explains:
                    self._answer([one], self._overlays)

    def _answer(self, batch: Sequence[_Request], compute: Callable[[Tensor], Iterable[Any]]) -> None:
        """Gives each request its result. What `compute` raises, the futures raise; the thread keeps running."""
        try:
            results = compute(torch.cat([one.pixels for one in batch]))
        except Exception as error:
            for one in batch:
                one.future.set_exception(error)
            return
        for result, one in zip(results, batch, strict=True):
            one.future.set_result(result)

    def _overlays(self, pixels: Tensor) -> list[Image.Image]:
        return overlays(self._classifier.model, self.transforms.finished(pixels.to(self._device)))

    @torch.inference_mode()
    def _probabilities(self, pixels: Tensor) -> Tensor:
        return self._classifier.probabilities(self.transforms.finished(pixels.to(self._device))).cpu()
