"""Ends this process when its parent process dies (PR_SET_PDEATHSIG)."""

import ctypes
import multiprocessing
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PARENT = os.getppid()
_SET_BY_LAUNCHERS = {"ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID"}


def end_with_launcher() -> None:
    """Makes the kernel send SIGTERM to this process when its launcher (accelerate or torchrun) dies.

    For a single process, `accelerate launch` does not forward signals: SIGTERM would end the launcher only.
    Must be called before torch is imported, which takes seconds.
    """
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        end_with_parent(signal.SIGTERM)
        if os.getppid() != _PARENT or _is_orphan():
            os.kill(os.getpid(), signal.SIGTERM)


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Makes the kernel send a signal to this process when its parent dies. Does nothing outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def end_with_starter() -> None:
    """Waits in a thread of a `multiprocessing` process until the process that started it dies, and then ends this one.

    The parent may be another one, the fork server, which lives as long as any process that it forked.
    """
    starter = multiprocessing.parent_process()
    if starter is not None:
        starter.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _is_orphan() -> bool:
    """Whether the launcher died before this module was imported: the parent is then process 1.

    In a container, process 1 may also be the launcher itself, which is a Python program, or a shell that sets the
    variables of a launch by hand.
    """
    if os.getppid() != 1 or not _SET_BY_LAUNCHERS & os.environ.keys():
        return False
    try:
        return b"python" not in Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return False
