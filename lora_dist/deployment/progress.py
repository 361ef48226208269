"""Reports the progress of a prediction: a bar on a terminal, otherwise a log line from time to time."""

import logging
import sys
import time

from tqdm import tqdm

EVERY_SECONDS = 60.0
"""Interval between log lines."""

logger = logging.getLogger(__name__)


class Progress:
    """Shows the number of finished rows, rows per second and the time left. As a context manager, it ends the bar."""

    def __init__(self, total: int, done: int = 0, silent: bool = False) -> None:
        """
        Args:
            total: rows in all.
            done: rows that an earlier run has made.
            silent: show nothing.
        """
        self._total, self._first, self._done = total, done, done
        self._silent = silent
        self._start = self._said = time.monotonic()
        shows_bar = not silent and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit=" images", smoothing=0.05, disable=not shows_bar)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance_to(self, done: int) -> None:
        """Notes that `done` rows exist now."""
        self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if self._silent or not self._bar.disable or now - self._said < EVERY_SECONDS:
            return
        self._said = now
        rate = (done - self._first) / (now - self._start)
        left = tqdm.format_interval((self._total - done) / rate) if rate else "?"
        logger.info("%d of %d images, %.1f images/s, %s left", done, self._total, rate, left)
