"""Counts requests, images and batches of the server, and writes the counts in the text format of Prometheus."""

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper limits of the histogram of durations, in seconds."""


class Metrics:
    """Counts requests, images and batches. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._durations = [0] * (len(BUCKETS) + 1)
        self._seconds = 0.0
        self._images: Counter[str] = Counter()
        self._batches: Counter[str] = Counter()
        self._model_seconds = 0.0

    def add_request(self, status: int, seconds: float) -> None:
        """Counts an answer to `/predict`, and the time from the start of the request to that of the answer."""
        with self._lock:
            self._requests[status] += 1
            self._durations[bisect_left(BUCKETS, seconds)] += 1
            self._seconds += seconds

    def add_batch(self, adapter: str, images: int, seconds: float) -> None:
        """Counts a batch that the model has classified."""
        with self._lock:
            self._images[adapter] += images
            self._batches[adapter] += 1
            self._model_seconds += seconds

    def text(self, waiting: int) -> str:
        """Returns all metrics; `waiting` is the number of images in the queue of the model."""
        with self._lock:
            return "\n".join([*self._lines(waiting), ""])

    def _lines(self, waiting: int) -> Iterator[str]:
        yield from _described("requests_total", "counter", "Requests to /predict, by status.")
        yield from _samples("requests_total", "status", self._requests)
        yield from _described("request_seconds", "histogram", "Duration of requests to /predict.")
        below = 0
        for limit, count in zip((*BUCKETS, "+Inf"), self._durations, strict=True):
            below += count
            yield f'lora_dist_request_seconds_bucket{{le="{limit}"}} {below}'
        yield f"lora_dist_request_seconds_sum {self._seconds}"
        yield f"lora_dist_request_seconds_count {below}"
        yield from _described("images_total", "counter", "Images that the model has classified, by adapter.")
        yield from _samples("images_total", "adapter", self._images)
        yield from _described("batches_total", "counter", "Batches that the model has classified, by adapter.")
        yield from _samples("batches_total", "adapter", self._batches)
        yield from _described("model_seconds_total", "counter", "Time that the model has worked.")
        yield f"lora_dist_model_seconds_total {self._model_seconds}"
        yield from _described("waiting_images", "gauge", "Images that wait for the model.")
        yield f"lora_dist_waiting_images {waiting}"


class MetricsMiddleware:
    """ASGI middleware that counts the requests to `/predict`, including those that another middleware refuses."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one ASGI connection."""
        if scope["type"] != "http" or scope["path"] != "/predict":
            await self.app(scope, receive, send)
            return
        start, is_counted = time.monotonic(), False

        async def counting(message: Any) -> None:
            nonlocal is_counted
            if message["type"] == "http.response.start":
                # Before it is sent, so that a client that has the answer finds it counted.
                is_counted = True
                self.metrics.add_request(message["status"], time.monotonic() - start)
            await send(message)

        try:
            await self.app(scope, receive, counting)
        except Exception:
            # The server answers 500, unless it has begun another answer.
            if not is_counted:
                self.metrics.add_request(500, time.monotonic() - start)
            raise


def _described(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP lora_dist_{name} {text}"
    yield f"# TYPE lora_dist_{name} {kind}"


def _samples(name: str, label: str, counts: Mapping[Any, int]) -> Iterator[str]:
    for value, count in sorted(counts.items()):
        escaped = str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        yield f'lora_dist_{name}{{{label}="{escaped}"}} {count}'
