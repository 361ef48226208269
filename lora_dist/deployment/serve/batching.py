"""Dynamic batching: images that arrive while the model runs form the next batch."""

import threading
from concurrent.futures import Future
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.model.classifier import Classifier


class Batcher:
    """Runs the model in a thread, without waiting for a batch to fill up."""

    def __init__(self, classifier: Classifier, max_batch_size: int, device: torch.device) -> None:
        self.transforms = ImageTransforms(classifier.processor, conversion=classifier.conversion)
        classifier.model.to(device)
        self._classifier = classifier
        self._device = device
        self._max_batch_size = max_batch_size
        self._queue: SimpleQueue[tuple[Tensor, Future[Tensor]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, pixels: Tensor) -> Future[Tensor]:
        """Queues an image [1, 3, H, W] from `ImageTransforms.resized`; the future gives probabilities [classes]."""
        future: Future[Tensor] = Future()
        self._queue.put((pixels, future))
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
            batch = [entry for entry in taken if entry is not None and entry[1].set_running_or_notify_cancel()]
            if not batch:
                continue
            try:
                probabilities = self._probabilities(torch.cat([pixels for pixels, _ in batch]))
            except Exception as error:
                # The futures raise it; the thread keeps running.
                for _, future in batch:
                    future.set_exception(error)
                continue
            for row, (_, future) in zip(probabilities, batch, strict=True):
                future.set_result(row)

    @torch.inference_mode()
    def _probabilities(self, pixels: Tensor) -> Tensor:
        return self._classifier.probabilities(self.transforms.finished(pixels.to(self._device))).cpu()
