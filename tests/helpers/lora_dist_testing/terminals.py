"""A terminal, to see what a user sees there."""

import fcntl
import os
import pty
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def terminal() -> Iterator[tuple[TextIO, Callable[[str], str]]]:
    """Yields a stream to a terminal of 80 columns, and a function that reads what it shows, up to a text."""
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def shown(end: str) -> str:
        content = b""
        while end.encode() not in content:
            content += os.read(reading, 10_000)
        return content.decode()

    try:
        with os.fdopen(writing, "w", buffering=1) as stream:
            yield stream, shown
    finally:
        os.close(reading)
