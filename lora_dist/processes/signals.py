"""The signals that ask a run to stop."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""Signals that make a run save and stop. SIGUSR1 is not among them, because NCCL uses it."""
