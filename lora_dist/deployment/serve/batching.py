"""Images of concurrent requests through the model in one batch: what comes in while it runs, runs next, together."""

import threading
from concurrent.futures import Future
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.model.classifier import Classifier


class Batcher:
    """A thread that runs the model. Nothing waits for a batch to fill up: a lone image runs at once."""

    def __init__(self, classifier: Classifier, largest: int, device: torch.device) -> None:
        """
        Args:
            classifier: to ask.
            largest: images in a forward pass.
            device: to run the model on.
        """
        self.transforms = ImageTransforms(classifier.processor)
        classifier.model.to(device)
        self._classifier = classifier
        self._device = device
        self._largest = largest
        self._waiting: SimpleQueue[tuple[Tensor, Future[Tensor]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, pixels: Tensor) -> Future[Tensor]:
        """Takes one image as `ImageTransforms.resized` gives it, [1, 3, H, W]; promises probabilities [classes]."""
        promise: Future[Tensor] = Future()
        self._waiting.put((pixels, promise))
        return promise

    def close(self) -> None:
        """Ends the thread when everything submitted before has been answered."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        last = False
        while not last:
            taken = [self._waiting.get()]
            while taken[-1] is not None and len(taken) < self._largest:
                try:
                    taken.append(self._waiting.get_nowait())
                except Empty:
                    break
            last = taken[-1] is None
            # A request that was given up is not computed.
            batch = [entry for entry in taken if entry is not None and entry[1].set_running_or_notify_cancel()]
            if not batch:
                continue
            try:
                probabilities = self._probabilities(torch.cat([pixels for pixels, _ in batch]))
            except Exception as error:
                # The server goes on; those who asked are told.
                for _, promise in batch:
                    promise.set_exception(error)
                continue
            for row, (_, promise) in zip(probabilities, batch, strict=True):
                promise.set_result(row)

    @torch.inference_mode()
    def _probabilities(self, pixels: Tensor) -> Tensor:
        return self._classifier.probabilities(self.transforms.finished(pixels.to(self._device))).cpu()
