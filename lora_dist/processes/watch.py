"""Notices that a run has stalled, or that another process of the launch has failed, and ends this process then."""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple, NoReturn

from lora_dist.errors import TrainingStoppedError, UserError
from lora_dist.processes.lifetime import GRACE_SECONDS, end_process, owns_process, show_stacks_of_children
from lora_dist.processes.peers import Peers
from lora_dist.processes.preemption import StopRequested

logger = logging.getLogger(__name__)

STALLED_CODE = 124
"""The exit code of a run in which nothing moves: that of timeout(1)."""
POLL_SECONDS = 1.0
NEWS_PERIOD = 0.05
"""Seconds from one look at the other processes to the next, while an error of a collective is explained."""
SAVING_SECONDS = 600.0
"""How long a save may go on once another process has failed."""
STORE_TIMEOUT = timedelta(seconds=10)
FIRST_SECONDS = 1200.0
"""How much longer the first update and the first batch of an evaluation may take: they compile and start workers."""
NOTICE_SECONDS = 3.0
"""How long an error of a collective waits for the news that another process is its reason."""
ANSWER_SECONDS = 5.0
"""How long the processes of a launch have to say what they are doing, once one has stalled."""


class Activity(NamedTuple):
    """What the main thread is doing.

    Attributes:
        name: such as `update 12: waiting for micro-batch 3`.
        since: when it began, by `time.monotonic`.
        patience: seconds that it may take beyond the time-out.
        saves: whether it is to be finished although another process has failed.
    """

    name: str
    since: float
    patience: float
    saves: bool


class Watch:
    """A thread that watches the main thread of this process, and through the launch's store the other processes.

    Attributes:
        resume_hint: appended to what a stall is reported with.
    """

    def __init__(self, stall_timeout: float, patient: bool = False) -> None:
        """
        Args:
            stall_timeout: seconds that one activity may take; 0 for ever.
            patient: every activity may take `FIRST_SECONDS` more, as where data come from a network.
        """
        self.resume_hint = ""
        self._timeout = stall_timeout
        # Not in the thread: accelerate empties the environment for moments.
        self._name = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
        self._is_warm, self._is_patient = False, patient
        self._activity = Activity("starting", time.monotonic(), FIRST_SECONDS, False)
        self._ended = threading.Event()
        self._awake = threading.Event()
        self._peers: Peers | None = None
        self._failure: UserError | None = None

    def now(self, name: str, first: bool = False, saves: bool = False) -> None:
        """Notes what the main thread does from here on; called whenever the run moves.

        Args:
            name: such as `update 12: waiting for micro-batch 3`.
            first: whether it may take `FIRST_SECONDS` more, as everything may before `warmed_up`, and every save.
            saves: whether it is to be finished although another process has failed.
        """
        patience = FIRST_SECONDS if first or saves or self._is_patient or not self._is_warm else 0.0
        self._activity = Activity(name, time.monotonic(), patience, saves)

    def moved(self) -> None:
        """Notes that what was under way has moved on."""
        self.warmed_up()
        self.now(self._activity.name)

    def warmed_up(self) -> None:
        """Notes that a first update has been made."""
        self._is_warm = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches as long as this block lasts, in a command that owns its process.

        Raises:
            RankFailedError: in place of an error of a collective, where another process is the reason.
        """
        if not owns_process():
            yield
            return
        self.now("starting")
        self._peers = Peers.of_launch(STORE_TIMEOUT)
        thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        thread.start()
        try:
            yield
        except RuntimeError as error:
            failure = self._failure_within(NOTICE_SECONDS)
            if failure is None:
                raise
            raise failure from error
        except (TrainingStoppedError, StopRequested):
            self._leave(thread)
            raise
        else:
            self._leave(thread)
        finally:
            self._end()

    def _leave(self, thread: threading.Thread) -> None:
        """Ends as all processes have agreed to."""
        self._end()
        thread.join()
        if self._peers is not None:
            self._peers.leave()

    def _end(self) -> None:
        self._ended.set()
        self._awake.set()

    def _failure_within(self, seconds: float) -> UserError | None:
        """What the thread has found out about the other processes, which may take a moment after the error here."""
        end = time.monotonic() + seconds
        self._awake.set()
        while self._failure is None and self._peers is not None and time.monotonic() < end:
            time.sleep(NEWS_PERIOD)
        return self._failure

    def _watch(self) -> None:
        period = min(POLL_SECONDS, self._timeout / 10 or POLL_SECONDS)
        activity, idle, before = self._activity, 0.0, time.monotonic()
        while not self._is_over_within(period):
            now = time.monotonic()
            # A process that was suspended has not stalled: only the time that this thread was awake counts.
            idle, before = idle + min(now - before, 2 * period), now
            if activity is not self._activity:
                activity, idle = self._activity, 0.0
            if self._timeout and idle > self._timeout + activity.patience:
                self._end_stalled(activity, idle)
            if self._peers is not None:
                try:
                    self._look_at(self._peers)
                except Exception as error:
                    logger.warning("cannot look after the other processes: %s: %s", type(error).__name__, error)

    def _is_over_within(self, seconds: float) -> bool:
        """Waits, less long where there is an error to be explained."""
        if self._awake.wait(seconds) and not self._ended.is_set():
            time.sleep(NEWS_PERIOD)
        return self._ended.is_set()

    def _look_at(self, peers: Peers) -> None:
        """Ends this process if another one has failed."""
        try:
            if peers.asked_for_activity():
                peers.tell_activity(self._line(self._activity))
            self._failure = peers.failure()
        except (RuntimeError, OSError):
            # Where rank 0 hosts the store, that has died; otherwise the launcher has, and signals this process.
            self._peers, self._failure = None, peers.lost()
        if self._failure is not None and not self._finishes():
            print(f"error: {self._failure}", file=sys.stderr, flush=True)
            end_process(self._failure.exit_code)

    def _finishes(self) -> bool:
        """Whether the main thread ends by itself, soon, and not before what it is saving is saved.

        Otherwise it waits in a collective that will never end.
        """
        end = time.monotonic() + GRACE_SECONDS / 2
        while not self._ended.wait(0.1):
            if time.monotonic() > end + (SAVING_SECONDS if self._activity.saves else 0.0):
                return False
        return True

    def _end_stalled(self, activity: Activity, seconds: float) -> NoReturn:
        """Says what every process is doing, writes all stacks, and ends this one."""
        lines = [self._line(activity)]
        with suppress(RuntimeError, OSError):
            if self._peers is not None:
                lines = self._peers.activities(self._line(activity), ANSWER_SECONDS)
                self._peers.tell_failure(f"stalled: {self._line(activity)}", STALLED_CODE)
        if lines:
            print(
                "\n  ".join([f"error: nothing has moved for {seconds:.0f} s (--stall_timeout):", *lines])
                + (f"\n{self.resume_hint}" if self.resume_hint else "")
                + "\nThe stacks of all threads follow.",
                file=sys.stderr,
                flush=True,
            )
        faulthandler.dump_traceback(all_threads=True)
        show_stacks_of_children()
        time.sleep(0.5)
        end_process(STALLED_CODE)

    def _line(self, activity: Activity) -> str:
        return f"{self._name}, for {time.monotonic() - activity.since:.0f} s: {activity.name}"
