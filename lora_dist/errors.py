"""The exceptions for what a user can put right, and how a command ends on them."""

import os
import socket
import sys
from collections.abc import Callable
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


def exit_on_user_error(command: Callable[P, R]) -> Callable[P, R]:
    """Makes a command print a `UserError` once on each node, not on each of its processes, and exit with its code."""

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

    return run
