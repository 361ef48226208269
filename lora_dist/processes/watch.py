"""Detects that the run has stalled or that another process has failed, and then ends this process."""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple, NoReturn, TypeVar

from lora_dist.errors import TrainingStoppedError, UserError
from lora_dist.processes.launch_summary import write_reason
from lora_dist.processes.lifetime import (
    GRACE_SECONDS,
    at_end,
    end_process,
    end_with_error,
    limit_exit,
    owns_process,
    show_stacks_of_children,
)
from lora_dist.processes.peers import Peers
from lora_dist.processes.preemption import StopRequested

logger = logging.getLogger(__name__)

T = TypeVar("T")

STALLED_CODE = 124
"""Exit code of a stalled run, the same as that of timeout(1)."""
POLL_SECONDS = 1.0
EXPLAIN_PERIOD = 0.05
"""Seconds between checks of the other processes while the cause of a failed collective is unknown."""
SAVING_SECONDS = 600.0
"""Seconds for which a save may continue after another process has failed."""
STORE_TIMEOUT = timedelta(seconds=10)
FIRST_SECONDS = 1200.0
"""Extra time for the first update and the first batch of an evaluation, which compile and start workers."""
EXPLAIN_SECONDS = 3.0
"""Seconds to wait, after a collective has failed, for a report that another process caused it."""
ANSWER_SECONDS = 5.0
"""Seconds for which a stalled process waits for the others to report their activity."""
STORE_SECONDS = 2.0
"""Seconds to wait for a request to the store that may never be answered: `TCPStore.check` ignores its timeout."""


class Activity(NamedTuple):
    """The current activity of the main thread.

    Attributes:
        name: such as `update 12: waiting for micro-batch 3`.
        since: start, by `time.monotonic`.
        patience: extra seconds allowed beyond the timeout.
    """

    name: str
    since: float
    patience: float


class Watch:
    """One thread detects stalls of the main thread by time alone; another checks the other processes of the launch.

    Attributes:
        resume_hint: sentence appended to the report of a stall.
    """

    def __init__(self, stall_timeout: float, patient: bool = False) -> None:
        """
        Args:
            stall_timeout: maximum seconds for one activity; 0 for no limit.
            patient: whether every activity may take `FIRST_SECONDS` more, as when the data come from a network.
        """
        self.resume_hint = ""
        self._timeout = stall_timeout
        # Read here, because accelerate clears the environment temporarily while the threads run.
        self._name = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
        self._is_warm, self._is_patient = False, patient
        self._is_writing = False
        self._activity = Activity("starting", time.monotonic(), FIRST_SECONDS)
        self._ended = threading.Event()
        self._awake = threading.Event()
        self._peers: Peers | None = None
        self._peer_thread: threading.Thread | None = None
        self._failure: UserError | None = None

    def enter(self, name: str, extra_time: bool = False) -> None:
        """Records the current activity of the main thread and restarts its timer. Called at every sign of progress.

        Args:
            name: such as `update 12: waiting for micro-batch 3`.
            extra_time: whether to allow `FIRST_SECONDS` more; always allowed before `end_warm_up`.
        """
        patience = FIRST_SECONDS if extra_time or self._is_patient or not self._is_warm else 0.0
        self._activity = Activity(name, time.monotonic(), patience)

    def progressed(self) -> None:
        """Records progress within the current activity."""
        self.end_warm_up()
        self.enter(self._activity.name)

    def end_warm_up(self) -> None:
        """Records that the first update is done, so that the extra time ends."""
        self._is_warm = True

    @contextmanager
    def watching_step(self, name: str) -> Iterator[None]:
        """Ends this process if a step before `watching` takes too long. Enters the activity `name`."""
        self.enter(name, extra_time=True)
        if not (owns_process() and self._timeout):
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._watch_progress, args=(ended,), name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()  # does not return if it has found a stall

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Lets the block finish within `SAVING_SECONDS` if another process fails."""
        self._is_writing = True
        try:
            yield
        finally:
            self._is_writing = False

    def watch_peers(self) -> None:
        """Starts to check the other processes, if this has not happened yet; does nothing unless `owns_process`.

        Call it after `init_process_group`: a process that dies while it loads the data ends the others as well.
        """
        if self._peer_thread is not None or not owns_process():
            return
        self._peers = Peers.of_launch(STORE_TIMEOUT)
        if self._peers is not None:
            self._peer_thread = threading.Thread(target=self._watch_peers, name="peers", daemon=True)
            self._peer_thread.start()
            at_end(self._end)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches this process and the others while the block runs; does nothing unless `owns_process`.

        Raises:
            RankFailedError: instead of the error of a collective, if the failure of another process caused it.
        """
        if not owns_process():
            yield
            return
        self.enter("starting")
        self.watch_peers()
        progress_thread = threading.Thread(target=self._watch_progress, args=(self._ended,), name="watch", daemon=True)
        if self._timeout:
            progress_thread.start()
        try:
            yield
        except RuntimeError as error:
            failure = self._explained_failure()
            if failure is None:
                raise
            raise failure from error
        except (TrainingStoppedError, StopRequested):
            self._leave()
            raise
        else:
            self._leave()
        finally:
            self._end()
            if self._timeout:
                progress_thread.join()  # does not return if it has found a stall

    def _leave(self) -> None:
        """Stops watching and records that this process exits normally."""
        self._end()
        if self._peer_thread is not None:
            self._peer_thread.join(STORE_SECONDS)
        if self._peers is not None:
            _call_within(STORE_SECONDS, self._peers.leave, None)

    def _end(self) -> None:
        self._ended.set()
        self._awake.set()

    def _explained_failure(self) -> UserError | None:
        """Waits for the thread to detect a failure of another process; returns it, or None."""
        end = time.monotonic() + EXPLAIN_SECONDS
        self._awake.set()
        while self._failure is None and self._peers is not None and time.monotonic() < end:
            time.sleep(EXPLAIN_PERIOD)
        return self._failure

    def _watch_progress(self, ended: threading.Event) -> None:
        """Ends this process if the main thread stalls. Does not use the store, which may hang as well."""
        period = min(POLL_SECONDS, self._timeout / 10)
        activity, idle, before = self._activity, 0.0, time.monotonic()
        while not ended.wait(period):
            now = time.monotonic()
            # A process that was suspended has not stalled: only the time that this thread was awake counts.
            idle, before = idle + min(now - before, 2 * period), now
            if activity is not self._activity:
                activity, idle = self._activity, 0.0
            if idle > self._timeout + activity.patience:
                self._end_stalled(activity, idle)

    def _watch_peers(self) -> None:
        """Ends this process if another one has failed."""
        while self._peers is not None and not self._ended_by_next_check():
            try:
                self._check(self._peers)
            except Exception as error:
                logger.warning("cannot check the other processes: %s: %s", type(error).__name__, error)

    def _ended_by_next_check(self) -> bool:
        """Waits for the next check, briefly if a collective has failed; returns whether watching has ended."""
        if self._awake.wait(POLL_SECONDS) and not self._ended.is_set():
            time.sleep(EXPLAIN_PERIOD)
        return self._ended.is_set()

    def _check(self, peers: Peers) -> None:
        try:
            if peers.activity_requested():
                peers.write_activity(self._line(self._activity))
            self._failure = peers.failure()
        except (RuntimeError, OSError):
            # If rank 0 hosts the store, rank 0 has died; otherwise the launcher has, and signals this process.
            self._peers, self._failure = None, peers.store_lost()
        if self._failure is not None and not self._finishes():
            end_with_error(str(self._failure), self._failure.exit_code)

    def _finishes(self) -> bool:
        """Waits for the main thread to end by itself, longer if it writes a checkpoint; returns whether it did.

        If not, it hangs in a collective.
        """
        end = time.monotonic() + GRACE_SECONDS / 2
        while not self._ended.wait(0.1):
            if time.monotonic() > end + (SAVING_SECONDS if self._is_writing else 0.0):
                return False
        return True

    def _end_stalled(self, activity: Activity, seconds: float) -> NoReturn:
        """Reports the activity of every process, writes all stack traces and ends this process."""
        limit_exit(STALLED_CODE, ANSWER_SECONDS + STORE_SECONDS + GRACE_SECONDS)
        self._end()
        lines, peers = [self._line(activity)], self._peers
        if peers is not None:
            lines = _call_within(ANSWER_SECONDS + STORE_SECONDS, lambda: self._report_stall(peers, lines[0]), lines)
        stacks = f"Stack traces of all threads:\n{_stacks()}"
        if lines:
            hint = [self.resume_hint] if self.resume_hint else []
            heading = "\n  ".join([f"error: no progress for {seconds:.0f} s (--stall_timeout):", *lines])
            write_reason("\n".join([heading, *hint]))
            stacks = "\n".join([heading, *hint, stacks])
        print(stacks, file=sys.stderr, flush=True)
        show_stacks_of_children()
        time.sleep(0.5)
        end_process(STALLED_CODE)

    def _report_stall(self, peers: Peers, line: str) -> list[str]:
        lines = peers.collect_activities(line, ANSWER_SECONDS)
        peers.write_failure(f"stalled: {line}", STALLED_CODE)
        return lines

    def _line(self, activity: Activity) -> str:
        return f"{self._name}, for {time.monotonic() - activity.since:.0f} s: {activity.name}"


def _call_within(seconds: float, function: Callable[[], T], default: T) -> T:
    """Calls a function that uses the store in a thread of its own; returns `default` if it fails or takes too long."""
    results: list[T] = []

    def call() -> None:
        with suppress(RuntimeError, OSError):
            results.append(function())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else default


def _stacks() -> str:
    """Formats the stack traces of all threads, without the source lines: reading them from the disk may hang."""
    reading, writing = os.pipe()
    # faulthandler writes while it holds the GIL: it must not block on standard error, nor on a full pipe.
    os.set_blocking(writing, False)
    faulthandler.dump_traceback(writing, all_threads=True)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8", errors="replace") as file:
        return file.read()
