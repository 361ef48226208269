"""Owns the end of a command: whatever way it ends, everything that it started ends with it, with the right exit code.

The interpreter's own exit waits for threads and joins worker processes, however long that takes: a worker that ignores
SIGTERM, a thread that waits for the network, or a collective that lost a peer would keep the process, and its GPU, for
ever. So a command runs in `run_command`, which cleans up for a bounded time and then leaves.
"""

import atexit
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

GRACE_SECONDS = 8.0
"""How long a command may take to clean up after its work is done or has failed."""

STACKS_SIGNAL = signal.SIGQUIT
"""Writes the stacks of all threads to standard error, at any time. (SIGUSR1 is NCCL's, SIGUSR2 asks for a stop.)"""

_BROKEN_OUTPUT = 120
"""The exit code of Python itself where standard output cannot be flushed."""

_owned = False
_cleanups: list[Callable[[], object]] = []


def at_end(cleanup: Callable[[], object]) -> None:
    """Registers a function that ends something this process started; called once, when the command ends.

    The last one registered is called first. Together they have `GRACE_SECONDS`.
    """
    _cleanups.append(cleanup)


def run_command(main: Callable[[], object]) -> NoReturn:
    """Runs a command as the whole program, and ends the process with its exit code.

    Loader workers and other child processes of `multiprocessing` are killed, threads are not waited for. For
    `if __name__ == "__main__"` alone: it never returns.

    Args:
        main: returns (code 0), or raises `SystemExit` (its code), or anything else (a traceback and code 1).
    """
    global _owned
    _owned = True
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    try:
        main()
    except BaseException as error:
        # While the exception is held, its frames keep their loaders: freeing these would wait for each worker.
        end_process(_exit_code(error))
    end_process(0)


def owns_process() -> bool:
    """Whether this process is a command, which `end_process` may end; not so in a notebook or a test."""
    return _owned


def end_process(code: int) -> NoReturn:
    """Ends everything that this process started, and then the process, within `GRACE_SECONDS`."""
    threading.Thread(target=_end_at_the_latest, args=(code,), daemon=True).start()
    while _cleanups:
        try:
            _cleanups.pop()()
        except Exception:
            traceback.print_exc()
    _kill_children()
    with suppress(Exception):
        atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        print(f"cannot write to standard output: {error}", file=sys.stderr)
        code = code or _BROKEN_OUTPUT
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def show_stacks_of_children() -> None:
    """Has every child process write its stacks to standard error."""
    for child in multiprocessing.active_children():
        with suppress(ProcessLookupError):
            os.kill(child.pid or 0, STACKS_SIGNAL)


def _exit_code(error: BaseException) -> int:
    """The exit code that Python would end with; prints what Python would print."""
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def _kill_children() -> None:
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    end = time.monotonic() + 2
    for child in children:
        child.join(max(0.0, end - time.monotonic()))


def _end_at_the_latest(code: int) -> None:
    time.sleep(GRACE_SECONDS)
    print(f"cleaning up took longer than {GRACE_SECONDS:.0f} s: ending without it", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)
