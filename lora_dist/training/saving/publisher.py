"""Pushes to a repository on the Hub in a background thread. Training neither waits for it nor fails with it."""

import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lora_dist import hub, hub_client, waiting
from lora_dist.errors import UserError
from lora_dist.hub import HubError
from lora_dist.settings.train import HubSettings
from lora_dist.training.saving.output import Output

logger = logging.getLogger(__name__)

WAITS = (1.0, 4.0, 15.0)
"""Seconds before each retry after a temporary error."""
FINAL_SECONDS = 300.0
"""Seconds that the end of a run waits for the Hub, in addition to the time of the upload at the rate `SLOWEST`."""
SLOWEST = 1e6
"""Bytes per second of the slowest connection that the end of a run waits for."""


@dataclass(frozen=True)
class Push:
    """A directory to push as one commit.

    Attributes:
        directory: with the files.
        message: of the commit.
        is_temporary: whether the directory is removed once it is pushed or replaced by a newer one.
    """

    directory: Path
    message: str
    is_temporary: bool

    def discard(self) -> None:
        """Removes a temporary directory."""
        if self.is_temporary:
            shutil.rmtree(self.directory, ignore_errors=True)


class Publisher:
    """Pushes one directory at a time. A newer one replaces one that waits for its turn or its next try.

    Attributes:
        name: of the repository; the full `namespace/name` once the Hub has opened it.
    """

    def __init__(self, name: str, private: bool, waits: Sequence[float] = WAITS) -> None:
        """
        Args:
            name: of the repository, with or without a namespace.
            private: whether to create the repository as private.
            waits: seconds before each retry.
        """
        self.name = name
        self._private = private
        self._waits = waits
        self._is_open = False
        self._changed = threading.Condition()
        self._next: Push | None = None
        self._final: Push | None = None
        self._pushed: Push | None = None
        self._failure = HubError("nothing was pushed yet", temporary=False)
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)
        self._thread.start()

    def open(self) -> None:
        """Creates the repository unless it exists.

        Raises:
            HubError: it cannot be created or written to, or the Hub does not answer.
        """
        self._try(self._open)

    def push(self, push: Push) -> None:
        """Queues a directory to push; returns at once."""
        with self._changed:
            replaced, self._next = self._next, push
            self._changed.notify_all()
        if replaced is not None:
            replaced.discard()

    def finish(self, push: Push, seconds: float | None = None) -> bool:
        """Makes the last push and waits for it. If it fails, logs the command to push by hand.

        Args:
            push: of the result of the run.
            seconds: to wait; by default according to its size.

        Returns:
            Whether the push has succeeded.
        """
        if seconds is None:
            seconds = FINAL_SECONDS + _bytes_in(push.directory) / SLOWEST
        logger.info("pushing %s to %s on the Hub; giving up after %.0f s", push.message, self.name, seconds)
        self._final = push
        self.push(push)
        self._thread.join(seconds)
        if self._pushed is push:
            return True
        if self._thread.is_alive():
            self._failure = HubError(f"it took longer than {seconds:.0f} s", temporary=True)
        logger.warning(
            "%s is complete, but could not be pushed to the Hub: %s\nTo push it by hand:\n    hf upload %s %s .",
            push.directory,
            self._failure,
            self.name,
            push.directory,
        )
        return False

    def _work(self) -> None:
        push = None
        while push is None or push is not self._final:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None)
                push, self._next = self._next, None
            assert push is not None
            self._publish(push)
            push.discard()

    def _publish(self, push: Push) -> None:
        try:
            self._try(lambda: self._send(push))
        except HubError as error:
            self._failure = error
            if push is not self._final:
                logger.warning(
                    "not pushed to the Hub: %s: %s\nTraining continues, and the next push updates the repository.",
                    push.message,
                    error,
                )
        else:
            self._pushed = push
            logger.info("pushed to %s on the Hub: %s", self.name, push.message)

    def _send(self, push: Push) -> None:
        if not self._is_open:
            self._open()
        hub.upload(self.name, push.directory, push.message)

    def _open(self) -> None:
        self.name = hub.open_repository(self.name, self._private)
        self._is_open = True

    def _try(self, call: Callable[[], None]) -> None:
        """Retries a call after temporary errors, unless a newer directory is queued."""
        for wait in self._waits:
            try:
                return _with_hub_errors(call)
            except HubError as error:
                if not error.temporary or self._is_replaced_within(wait):
                    raise
        return _with_hub_errors(call)

    def _is_replaced_within(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._next is not None, timeout=seconds)


def _with_hub_errors(call: Callable[[], None]) -> None:
    """Calls `call`, and turns every exception into a `HubError`, so that it ends neither the thread nor the run."""
    try:
        call()
    except HubError:
        raise
    except Exception as error:
        raise HubError(f"{type(error).__name__}: {error}", temporary=False) from error


def _bytes_in(directory: Path) -> int:
    """Size of the files in a directory; 0 if it does not exist, which the push reports."""
    return sum(file.stat().st_size for file in directory.iterdir()) if directory.is_dir() else 0


def require_token(settings: HubSettings) -> None:
    """Raises a `UserError` if a push is requested but the client is offline or has no token. Does not ask the Hub."""
    if settings.push_to_hub:
        try:
            hub.require_login()
        except HubError as error:
            raise UserError(f"--push_to_hub: {error}") from error


def open_publisher(accelerator: Accelerator, settings: HubSettings, output: Output, resumes: bool) -> Publisher | None:
    """Returns the publisher of a run with `--push_to_hub` on the first process, else None.

    Called on every process.

    Args:
        settings: what to push to.
        resumes: whether the run resumes; an unreachable Hub is then only logged.

    Raises:
        UserError: on every process, if the repository cannot be opened.
    """
    publisher, problem = None, ""
    if settings.push_to_hub and accelerator.is_main_process:
        publisher = Publisher(settings.hub_model_id or output.root.resolve().name, settings.hub_private_repo)
        message = f"waiting for the Hub at {hub_client.endpoint()} to open {publisher.name}"
        try:
            with waiting.log_wait(message):
                publisher.open()
        except HubError as error:
            problem = f"--push_to_hub: cannot push to {publisher.name} on the Hub: {error}"
            if resumes and error.temporary:
                logger.warning("%s\nTraining continues, and the next push tries again.", problem)
                problem = ""
    if settings.push_to_hub:
        (problem,) = broadcast_object_list([problem])
    if problem:
        raise UserError(problem)
    return publisher
