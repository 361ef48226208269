"""Dynamic batching: images that arrive while the model runs form the next batch. Explanations run one by one."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from lora_dist.deployment.classify import choose_batch_size
from lora_dist.deployment.explain import overlays
from lora_dist.model.trained.adapter_set import AdapterSet


class _Request(NamedTuple):
    name: str
    pixels: Tensor
    future: Future[Any]
    explains: bool


class Batcher:
    """Runs the model in a thread, without waiting for a batch to fill up.

    Attributes:
        transforms: of each adapter, by its name.
    """

    def __init__(
        self,
        served: AdapterSet,
        max_batch_size: int | None,
        device: torch.device,
        after_batch: Callable[[str, int, float], object] = lambda *_: None,
    ) -> None:
        """
        Args:
            served: the model, with one or several adapters.
            max_batch_size: images per forward pass; None as in `choose_batch_size`.
            device: the model is moved there.
            after_batch: called with the name of an adapter, the number of its images, and the seconds they took.
        """
        self.transforms = {name: one.transforms() for name, one in served.classifiers.items()}
        for classifier in served.classifiers.values():
            classifier.model.to(device)
        self._served = served
        self._device = device
        self._max_batch_size = choose_batch_size(max_batch_size, device, next(iter(self.transforms.values())))
        self._after_batch = after_batch
        self._queue: SimpleQueue[_Request | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, name: str, pixels: Tensor) -> Future[Tensor]:
        """Queues an image for an adapter; the future gives probabilities [classes].

        Args:
            name: of the adapter.
            pixels: [1, 3, H, W] from `resized` of its transforms.
        """
        return self._queued(name, pixels, explains=False)

    def explain(self, name: str, pixels: Tensor) -> Future[Image.Image]:
        """Queues an image as `submit`; the future gives it with a heat map (see `overlays`)."""
        return self._queued(name, pixels, explains=True)

    def _queued(self, name: str, pixels: Tensor, explains: bool) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.put(_Request(name, pixels, future, explains))
        return future

    @property
    def waiting(self) -> int:
        """Images that wait for the model."""
        return self._queue.qsize()

    @property
    def is_alive(self) -> bool:
        """Whether submitted images will be classified."""
        return self._thread.is_alive()

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
            for name in dict.fromkeys(one.name for one in batch):
                self._classify(name, [one for one in batch if one.name == name])
            for one in waiting:
                if one.explains:
                    _answer([one], partial(self._overlays, one.name))

    def _classify(self, name: str, batch: list[_Request]) -> None:
        start = time.monotonic()
        _answer(
            batch,
            partial(self._probabilities, name),
            lambda: self._after_batch(name, len(batch), time.monotonic() - start),
        )

    def _overlays(self, name: str, pixels: Tensor) -> list[Image.Image]:
        classifier = self._served.set_adapter(name)
        return overlays(classifier.model, self.transforms[name].finished(pixels.to(self._device)))

    @torch.inference_mode()
    def _probabilities(self, name: str, pixels: Tensor) -> Tensor:
        classifier = self._served.set_adapter(name)
        return classifier.probabilities(self.transforms[name].finished(pixels.to(self._device))).cpu()


def _answer(
    batch: Sequence[_Request], compute: Callable[[Tensor], Iterable[Any]], computed: Callable[[], object] = lambda: None
) -> None:
    """Gives each request its result. What `compute` raises, the futures raise; the thread keeps running."""
    try:
        results = compute(torch.cat([one.pixels for one in batch]))
    except Exception as error:
        for one in batch:
            one.future.set_exception(error)
        return
    computed()
    for result, one in zip(results, batch, strict=True):
        one.future.set_result(result)
