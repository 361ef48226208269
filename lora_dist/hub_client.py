"""How long the client of the Hub waits for an answer, and what is said meanwhile.

By itself it waits for ever for some answers, and for six minutes a file for others. Here each request has a time-out,
and a Hub that stays silent is asked no more: then the client goes on as with HF_HUB_OFFLINE=1, with what is cached. A
download that moves, however slowly, is not cut.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_dist import waiting
from lora_dist.errors import UserError

PATIENCE_SECONDS = 60.0
"""How long the Hub may be silent, over all requests since its last answer, before what is being read is given up.
HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT raise it."""
ANSWER_SECONDS = 30.0
"""For one answer, where the client has no time-out of its own."""
SENDING_SECONDS = 300.0
"""The same for a file that is sent and for a commit, over which the Hub takes a while."""


class _Silence:
    """How long the Hub has been silent. Its requests may come from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before = 0.0
        self._asked: float | None = None
        self._allowed = 0.0
        self.requests = 0

    def asked(self, seconds: float) -> None:
        """A request goes out, and waits at most so long."""
        with self._lock:
            self._before = self._seconds()
            self._asked, self._allowed = time.monotonic(), seconds

    def answered(self) -> None:
        """Some request has got an answer."""
        with self._lock:
            self._before, self._asked = 0.0, None

    def _seconds(self) -> float:
        # What passed after a request had timed out was not spent waiting.
        return self._before + (0.0 if self._asked is None else min(time.monotonic() - self._asked, self._allowed))

    @property
    def seconds(self) -> float:
        """Spent waiting since the last answer."""
        with self._lock:
            return self._seconds()

    @property
    def has_timed_out(self) -> bool:
        """Whether the last request got no answer in its time; one that was refused does not count."""
        with self._lock:
            return self._asked is not None and time.monotonic() - self._asked >= self._allowed


_silence = _Silence()
_reading = 0
"""How many blocks of `reading` this process is in."""
_is_set_up = False


def set_up() -> None:
    """Gives the client of this process its time-outs. Called before it is used."""
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
    # A public extension of httpx: seconds to connect, to read, to write and to get a connection from the pool.
    timeouts = {name: default if value is None else value for name, value in request.extensions["timeout"].items()}
    if reads and _reading:
        _silence.requests += 1
        left = _patience() - _silence.seconds
        if left <= 0:
            raise OfflineModeIsEnabled(f"the Hub at {endpoint()} has not answered for {_patience():.0f} s")
        timeouts = {name: min(value, max(left, 1.0)) for name, value in timeouts.items()}
        _silence.asked(timeouts["read"])
    request.extensions["timeout"] = timeouts


def endpoint() -> str:
    """The address of the Hub."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def _patience() -> float:
    from huggingface_hub import constants

    return max(PATIENCE_SECONDS, constants.HF_HUB_DOWNLOAD_TIMEOUT, constants.HF_HUB_ETAG_TIMEOUT)


@contextmanager
def reading(what: str, bring: str) -> Iterator[None]:
    """Where something is loaded that may come from the Hub: says what is waited for, and gives up a silent Hub.

    Args:
        what: is loaded, such as "the base model NAME".
        bring: how it is brought here where there is a network, such as "`hf download NAME`".

    Raises:
        UserError: the Hub did not answer, and what is cached does not do.
    """
    global _reading
    set_up()
    before = _silence.requests

    def message() -> str:
        if _silence.requests == before:
            return f"loading {what}"
        if _silence.seconds:
            limit = f"giving up after at most {_patience():.0f} s of silence"
            return f"waiting for the Hub at {endpoint()} to answer: {what}; {limit}"
        return f"loading {what} from the Hub at {endpoint()}"

    _reading += 1
    try:
        with waiting.log_wait(message):
            yield
    except Exception as error:
        if _silence.requests > before and _silence.has_timed_out and _may_come_of_silence(error):
            raise UserError(
                f"cannot load {what}: it is not cached, and the Hub at {endpoint()} has not answered for "
                f"{_silence.seconds:.0f} s. Is the network up, and is that the right address (HF_ENDPOINT, "
                f"HTTPS_PROXY)? Where there is no network, bring it here before, by {bring}, and set HF_HUB_OFFLINE=1."
            ) from error
        raise
    finally:
        _reading -= 1


def _may_come_of_silence(error: BaseException | None) -> bool:
    """Whether something in the chain of causes is about a connection, or about files: `transformers` tells no more."""
    while error is not None:
        if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
            return True
        error = error.__cause__ or error.__context__
    return False
