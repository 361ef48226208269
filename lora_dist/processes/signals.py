"""The signals that ask a run to stop."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""Signals that make a run save and stop. SIGUSR1 is not among them, because NCCL uses it."""
SAME_REQUEST_SECONDS = 3.0
"""Signals within this time count as one request: on Ctrl-C, both the terminal and the launcher send a signal."""
