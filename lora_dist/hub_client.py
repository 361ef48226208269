"""Timeouts for `huggingface_hub`, and log messages while it waits.

By default the client waits forever for some responses, and six minutes per file for others. Here each request has a
timeout. If the Hub stays silent, further requests fail as with HF_HUB_OFFLINE=1, and the client uses its cache. Slow
downloads are not interrupted.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_dist import waiting
from lora_dist.errors import UserError

PATIENCE_SECONDS = 60.0
"""Time without a response, over all requests, before loading fails. HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT
raise it."""
ANSWER_SECONDS = 30.0
"""Timeout of a request for which the client sets none."""
SENDING_SECONDS = 300.0
"""Timeout of uploads and commits."""


class _Silence:
    """Measures how long the Hub has not responded. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before = 0.0
        self._asked: float | None = None
        self._allowed = 0.0
        self.requests = 0

    def asked(self, seconds: float) -> None:
        """Records a request with a timeout of `seconds`."""
        with self._lock:
            self._before = self._seconds()
            self._asked, self._allowed = time.monotonic(), seconds

    def answered(self) -> None:
        """Records a response."""
        with self._lock:
            self._before, self._asked = 0.0, None

    def _seconds(self) -> float:
        # The time after a timeout was not spent waiting.
        return self._before + (0.0 if self._asked is None else min(time.monotonic() - self._asked, self._allowed))

    @property
    def seconds(self) -> float:
        """Seconds of waiting since the last response."""
        with self._lock:
            return self._seconds()

    @property
    def has_timed_out(self) -> bool:
        """Whether the last request timed out; refused connections do not count."""
        with self._lock:
            return self._asked is not None and time.monotonic() - self._asked >= self._allowed


_silence = _Silence()
_reading = 0
"""Number of `reading` blocks that this process is in."""
_is_set_up = False


def set_up() -> None:
    """Sets the timeouts of the client in this process. Call before using the client."""
    global _is_set_up
    if _is_set_up:
        return
    import huggingface_hub
    from huggingface_hub.utils._http import default_client_factory

    def make() -> Any:
        client = default_client_factory()
        client.event_hooks["request"].append(_before_request)
        client.event_hooks["response"].append(lambda _: _silence.answered())
        return client

    huggingface_hub.set_client_factory(make)
    _is_set_up = True


def _before_request(request: Any) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    reads = request.method in ("GET", "HEAD")
    default = SENDING_SECONDS if request.method == "PUT" or "/commit/" in request.url.path else ANSWER_SECONDS
    # httpx: seconds to connect, read, write, and get a connection from the pool.
    timeouts = {name: default if value is None else value for name, value in request.extensions["timeout"].items()}
    if reads and _reading:
        _silence.requests += 1
        left = _patience() - _silence.seconds
        if left <= 0:
            raise OfflineModeIsEnabled(f"the Hub at {endpoint()} has not responded for {_patience():.0f} s")
        timeouts = {name: min(value, max(left, 1.0)) for name, value in timeouts.items()}
        _silence.asked(timeouts["read"])
    request.extensions["timeout"] = timeouts


def endpoint() -> str:
    """URL of the Hub."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def _patience() -> float:
    from huggingface_hub import constants

    return max(PATIENCE_SECONDS, constants.HF_HUB_DOWNLOAD_TIMEOUT, constants.HF_HUB_ETAG_TIMEOUT)


@contextmanager
def reading(what: str, bring: str) -> Iterator[None]:
    """Wraps code that may load from the Hub: logs what it waits for, and stops waiting if the Hub does not respond.

    Args:
        what: Name of the thing to load, e.g. "the base model NAME".
        bring: Command that downloads it in advance, e.g. "`hf download NAME`".

    Raises:
        UserError: The Hub did not respond, and the cache is not sufficient.
    """
    global _reading
    set_up()
    before = _silence.requests

    def message() -> str:
        if _silence.requests == before:
            return f"loading {what}"
        if _silence.seconds:
            return f"waiting up to {_patience():.0f} s for the Hub at {endpoint()} to respond: {what}"
        return f"loading {what} from the Hub at {endpoint()}"

    _reading += 1
    try:
        with waiting.log_wait(message):
            yield
    except Exception as error:
        if _silence.requests > before and _silence.has_timed_out and _is_network_error(error):
            raise UserError(
                f"cannot load {what}: it is not cached, and the Hub at {endpoint()} has not responded for "
                f"{_silence.seconds:.0f} s. Check the network, HF_ENDPOINT and HTTPS_PROXY. To run without network "
                f"access, download it first ({bring}) and set HF_HUB_OFFLINE=1."
            ) from error
        raise
    finally:
        _reading -= 1


def _is_network_error(error: BaseException | None) -> bool:
    """Whether the chain of causes contains a connection error, or an `OSError`, which `transformers` raises instead."""
    while error is not None:
        if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
            return True
        error = error.__cause__ or error.__context__
    return False
