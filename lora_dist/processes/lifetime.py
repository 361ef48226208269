"""Ends a command and everything that it started within a bounded time, with the right exit code.

The interpreter's own exit waits for threads and joins worker processes, without a time limit: a worker that ignores
SIGTERM, a thread that waits for the network, or a collective that lost a peer would keep the process, and its GPU, for
ever. A command therefore runs in `run_command`, which limits the time for cleanup and then exits.
"""

import atexit
import faulthandler
import io
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import NoReturn, ParamSpec, TypeVar

from lora_dist.errors import ProcessError, UserError
from lora_dist.processes.launch_summary import write_reason

P = ParamSpec("P")
R = TypeVar("R")

GRACE_SECONDS = 8.0
"""Seconds for a command to clean up after its work is done or has failed."""

STACKS_SIGNAL = signal.SIGQUIT
"""Makes a process write all stack traces to standard error. (NCCL uses SIGUSR1; SIGUSR2 requests a stop.)"""

_BROKEN_OUTPUT = 120
"""Exit code that Python uses if it cannot flush standard output."""

_owned = False
_cleanups: list[Callable[[], object]] = []


def at_end(cleanup: Callable[[], object]) -> None:
    """Registers a cleanup function, which is called once when the command ends.

    Functions are called in reverse order of registration. `GRACE_SECONDS` limits their total time.
    """
    _cleanups.append(cleanup)


def run_command(main: Callable[[], object]) -> NoReturn:
    """Runs a command as the whole program, and ends the process with its exit code.

    Kills DataLoader workers and other child processes of `multiprocessing`, and does not join threads. Never returns:
    call it only under `if __name__ == "__main__"`.

    Args:
        main: the command. Exit code: 0 if it returns, that of `SystemExit`, or 1 for any other exception.
    """
    global _owned
    _owned = True
    _prepare_standard_streams()
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    try:
        main()
    except BaseException as error:
        # Ends the process while it holds the exception, whose frames hold the loaders: freeing a loader would wait for
        # each of its workers.
        end_process(_exit_code(error))
    end_process(0)


def _prepare_standard_streams() -> None:
    """Opens `/dev/null` for closed streams, and escapes what standard output cannot encode, as standard error does.

    Files of a run would get the descriptors of closed streams otherwise.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: PTH123, SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def exit_on_user_error(command: Callable[P, R]) -> Callable[P, R]:
    """Makes a command print a `UserError` once on each node, not once a process, and exit with the code of the error.

    Ctrl-C, if nothing else handles it, makes the command exit with 128 + the signal number, as shells expect.
    """

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            _require_working_directory()
            return command(*args, **kwargs)
        except UserError as error:
            write_reason(f"{error.label}: {error}")
            rank = os.environ.get("RANK", "0")
            if isinstance(error, ProcessError) or os.environ.get("LOCAL_RANK", "0") == "0":
                who = "" if rank == "0" else f"rank {rank} on {socket.gethostname()}: "
                if owns_process():
                    limit_exit(error.exit_code)
                print(f"{error.label}: {who}{error}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print("interrupted", file=sys.stderr, flush=True)
            sys.exit(128 + signal.SIGINT)

    return run


def _require_working_directory() -> None:
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError as error:
        raise UserError("the working directory has been deleted; change to another one") from error


def owns_process() -> bool:
    """Whether this process was started through `run_command`; False in a notebook or a test."""
    return _owned


def limit_exit(code: int, seconds: float | None = None) -> None:
    """Starts a timer that ends the process with this code after `seconds` (default: `GRACE_SECONDS`).

    Call it before anything that may block, such as writing to a pipe that nobody reads.
    """
    seconds = GRACE_SECONDS if seconds is None else seconds
    threading.Thread(target=_exit_after, args=(seconds, code), name="exit", daemon=True).start()


def end_with_error(message: str, code: int) -> NoReturn:
    """Ends this process as `end_process`; the log and the summary of the launcher have the error."""
    limit_exit(code)
    write_reason(f"error: {message}")
    print(f"error: {message}", file=sys.stderr, flush=True)
    end_process(code)


def end_process(code: int) -> NoReturn:
    """Runs the cleanup functions, kills child processes and exits, within `GRACE_SECONDS`."""
    limit_exit(code)
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
    """Makes every child process write its stack traces to standard error."""
    for child in multiprocessing.active_children():
        with suppress(ProcessLookupError):
            os.kill(child.pid or 0, STACKS_SIGNAL)


def _exit_code(error: BaseException) -> int:
    """Returns the exit code of Python for an exception; prints what Python would print."""
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    limit_exit(1)
    if isinstance(error, SystemExit):
        write_reason(str(error.code))
        print(error.code, file=sys.stderr)
    else:
        write_reason(f"{type(error).__name__}: {error}")
        sys.excepthook(type(error), error, error.__traceback__)
    return 1


def _kill_children() -> None:
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    end = time.monotonic() + 2
    for child in children:
        child.join(max(0.0, end - time.monotonic()))


def _exit_after(seconds: float, code: int) -> None:
    time.sleep(seconds)
    for child in multiprocessing.active_children():
        child.kill()
    message = f"cleaning up took longer than {seconds:.0f} s: exiting now"
    options = {"file": sys.stderr, "flush": True}
    # In a thread, because standard error may block.
    printer = threading.Thread(target=print, args=(message,), kwargs=options, daemon=True)
    printer.start()
    printer.join(1)
    os._exit(code)
