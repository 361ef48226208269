"""The signals that ask a run to stop."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""Saves and stops. SIGUSR1 is NCCL's own."""
