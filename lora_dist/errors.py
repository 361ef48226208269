"""The exceptions for what a user can put right, and how a command ends on them."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class UserError(Exception):
    """Something the user can fix. The message names the thing and the way out; no traceback is shown."""

    exit_code = 2
    label = "error"


class ProcessError(UserError):
    """A `UserError` that one process alone knows of, so that it has to speak whichever it is."""


class TrainingStoppedError(UserError):
    """A run that cannot sensibly go on, although its settings were fine."""

    exit_code = 1


class PreemptedError(UserError):
    """A run that was asked to stop and has saved; it goes on from there.

    The code is that of `EX_TEMPFAIL` in sysexits.h: nothing is wrong, try again later.
    """

    exit_code = 75
    label = "stopped"


class Problems:
    """What speaks against a run: any run ends at the first such thing, but a dry run, which says all of them.

    Attributes:
        dry_run: whether this is one.
        found: messages, of a dry run.
    """

    def __init__(self, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.found: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Whatever `UserError` comes in this block is noted, or passed on."""
        try:
            yield
        except UserError as error:
            if not self.dry_run:
                raise
            self.found.append(str(error))

    @contextmanager
    def raise_all(self) -> Iterator[None]:
        """Ends with a `UserError` that lists what was noted in this block, and what ended it."""
        try:
            yield
        except UserError as error:
            if not self.found:
                raise
            raise type(error)(_listed([*self.found, str(error)])) from error
        if self.found:
            raise UserError(_listed(self.found))


def _listed(messages: list[str]) -> str:
    return "\n  ".join(["this run would not start:", *messages])


def exit_on_user_error(command: Callable[P, R]) -> Callable[P, R]:
    """Makes a command print a `UserError` once on each node, not on each of its processes, and exit with its code.

    Ctrl-C, where nothing else takes it, ends it as a shell expects: with 128 and the number of the signal.
    """

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            rank = os.environ.get("RANK", "0")
            if isinstance(error, ProcessError) or os.environ.get("LOCAL_RANK", "0") == "0":
                who = "" if rank == "0" else f"rank {rank} on {socket.gethostname()}: "
                print(f"{error.label}: {who}{error}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print("interrupted", file=sys.stderr, flush=True)
            sys.exit(128 + signal.SIGINT)

    return run
