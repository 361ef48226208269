"""Ends this process when the one that started it dies (PDEATHSIG)."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Has the kernel send SIGTERM to this process when its launcher dies, if there is one.

    The launcher of a single process passes no signals on: sent SIGTERM, it would leave the training behind, running.
    Called first of all, since loading torch takes seconds.
    """
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        end_with_parent(signal.SIGTERM)


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Has the kernel send a signal to this process when its parent dies. Does nothing on other systems than Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
