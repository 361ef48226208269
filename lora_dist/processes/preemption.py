"""Requests to stop (signals) and to save (the file `SAVE`), on which all processes act at the same step."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from lora_dist.processes.lifetime import owns_process
from lora_dist.processes.signals import SAME_REQUEST_SECONDS, STOP_SIGNALS

logger = logging.getLogger(__name__)


class StopRequested(Exception):  # noqa: N818  (not an error)
    """All processes have agreed to stop here."""


class Preemption:
    """Listens for stop signals and the save file, and makes all processes act on them at the same step.

    The training loop saves the checkpoint, and `training.failures.stopped_on_request` ends the run.
    """

    def __init__(self, accelerator: Accelerator, save_file: Path) -> None:
        """
        Args:
            save_file: file that requests a checkpoint if it exists.
        """
        self._accelerator = accelerator
        self._save_file = save_file
        self._stop = threading.Event()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Treats a stop signal as a request to stop. A second one ends the process at once, even if it hangs."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        # Python runs handlers only between instructions of the main thread, which may wait in a collective for ever.
        # The numbers written to this file reach the thread even then.
        wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        listener = threading.Thread(target=self._listen, args=(reading,), daemon=True)
        listener.start()
        try:
            yield
        except StopRequested:
            if owns_process():
                # The processes now exit, each at its own pace, and launchers send signals to the slower ones.
                handlers = dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN)
            raise
        except Exception:
            if owns_process():
                # The process is about to report its error; a launcher that has noticed it may send SIGTERM before.
                handlers[signal.SIGTERM] = signal.SIG_IGN
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            # Closing it would not end the listener: workers that were forked from this process keep it open.
            os.write(writing, bytes([0]))
            listener.join()
            os.close(reading)
            os.close(writing)

    def requests(self) -> tuple[bool, bool]:
        """Returns whether this process was asked to stop, and to save."""
        return self._stop.is_set(), self._accelerator.is_main_process and self._save_file.exists()

    def check(self, summed: Sequence[float] | None = None) -> bool:
        """Acts on the requests of all processes. Collective: must be called on every process at the same step.

        Args:
            summed: sums of `requests` over all processes, if the caller has computed them; None to compute them here. A
                single process ignores them, and acts on its present requests.

        Returns:
            Whether a checkpoint was requested.

        Raises:
            StopRequested: on every process, if any of them has received a stop signal.
        """
        requested: Sequence[float] = self.requests()
        if self._accelerator.num_processes > 1:
            if summed is None:
                own = torch.tensor(requested, dtype=torch.float32, device=self._accelerator.device)
                summed = self._accelerator.reduce(own, "sum").tolist()
            requested = summed
        stop, save = requested
        if stop:
            raise StopRequested
        return bool(save)

    def clear_save_request(self) -> None:
        """Deletes the file that requested a checkpoint."""
        if self._accelerator.is_main_process:
            self._save_file.unlink(missing_ok=True)

    def _listen(self, reading: int) -> None:
        first = 0.0
        while number := os.read(reading, 1)[0]:
            if number not in STOP_SIGNALS:
                continue
            if not self._stop.is_set():
                first = time.monotonic()
                self._stop.set()
                logger.warning(
                    "%s: saving and stopping after this update; a second signal ends the process at once",
                    _name(number),
                )
            elif time.monotonic() - first > SAME_REQUEST_SECONDS:
                print(f"second signal ({_name(number)}): exiting without saving", file=sys.stderr, flush=True)
                os._exit(128 + number)


def _name(number: int) -> str:
    return signal.Signals(number).name
