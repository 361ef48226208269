"""Dynamic batching: images that arrive while the model runs form the next batch."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.model.adapter_set import AdapterSet

Entry = tuple[str, Tensor, Future[Tensor]]
"""Name of an adapter, pixels, and the probabilities to come."""


class Batcher:
    """Runs the model in a thread, without waiting for a batch to fill up.

    Attributes:
        transforms: of each adapter, by its name.
    """

    def __init__(
        self,
        served: AdapterSet,
        max_batch_size: int,
        device: torch.device,
        after_batch: Callable[[str, int, float], object] = lambda *_: None,
    ) -> None:
        """
        Args:
            served: the model, with one or several adapters.
            max_batch_size: images per forward pass.
            device: the model is moved there.
            after_batch: called with the name of an adapter, the number of its images, and the seconds they took.
        """
        self.transforms = {
            name: ImageTransforms(one.processor, conversion=one.conversion) for name, one in served.classifiers.items()
        }
        for classifier in served.classifiers.values():
            classifier.model.to(device)
        self._served = served
        self._device = device
        self._max_batch_size = max_batch_size
        self._after_batch = after_batch
        self._queue: SimpleQueue[Entry | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, name: str, pixels: Tensor) -> Future[Tensor]:
        """Queues an image for an adapter; the future gives probabilities [classes].

        Args:
            name: of the adapter.
            pixels: [1, 3, H, W] from `resized` of its transforms.
        """
        future: Future[Tensor] = Future()
        self._queue.put((name, pixels, future))
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
            batch = [entry for entry in taken if entry is not None and entry[2].set_running_or_notify_cancel()]
            for name in dict.fromkeys(name for name, *_ in batch):
                self._classify(name, [(pixels, future) for other, pixels, future in batch if other == name])

    def _classify(self, name: str, batch: list[tuple[Tensor, Future[Tensor]]]) -> None:
        start = time.monotonic()
        try:
            probabilities = self._probabilities(name, torch.cat([pixels for pixels, _ in batch]))
        except Exception as error:
            # The futures raise it; the thread keeps running.
            for _, future in batch:
                future.set_exception(error)
            return
        self._after_batch(name, len(batch), time.monotonic() - start)
        for row, (_, future) in zip(probabilities, batch, strict=True):
            future.set_result(row)

    @torch.inference_mode()
    def _probabilities(self, name: str, pixels: Tensor) -> Tensor:
        classifier = self._served.set_adapter(name)
        return classifier.probabilities(self.transforms[name].finished(pixels.to(self._device))).cpu()
