"""What becomes of this process when its launcher dies."""

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
    if sys.platform == "linux" and {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
