"""Tracks through the store whether the other processes are alive and what they are doing."""

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lora_dist.errors import TrainingStoppedError, UserError
from lora_dist.processes.failure import RankFailedError, has_left, mark_left, read_failure, write_failure
from lora_dist.processes.rendezvous import Launch, launch_store, store_lost

if TYPE_CHECKING:
    from torch.distributed import Store

_ASKED = "activity/asked"


class Peers:
    """The processes of this launch. Not thread-safe: all methods share one connection to the store."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        launch = Launch.read()
        self._hosted_by_rank_0 = launch is not None and launch.is_hosted_by_rank_0()
        self._rank, self._world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        first = self._rank - int(os.environ.get("LOCAL_RANK", "0"))
        here = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        # accelerate sets LOCAL_WORLD_SIZE to 1 if the launcher has not set it.
        candidates = here if len(here) > 1 else range(self._world_size)
        # Some of them may be on other machines: `failure` compares the identities.
        self._maybe_here = [rank for rank in candidates if rank != self._rank]
        self._here: dict[int, int] = {}
        store.set(f"process/{self._rank}", _identity())

    @classmethod
    def of_launch(cls, timeout: timedelta) -> Self | None:
        """The processes of this launch; None if there is only one, or if its store cannot be reached."""
        with suppress(RuntimeError, OSError, UserError):
            store = launch_store(timeout)
            return None if store is None else cls(store)
        return None

    def leave(self) -> None:
        """Records that this process exits normally, so that the others do not report it as dead."""
        with suppress(RuntimeError, OSError):
            mark_left(self._store, self._rank)

    def failure(self) -> RankFailedError | None:
        """Returns the first reported failure. Reports processes of this machine that have died."""
        for rank in [rank for rank in self._maybe_here if self._store.check([f"process/{rank}"])]:
            self._maybe_here.remove(rank)
            machine, number = self._store.get(f"process/{rank}").decode().rsplit(" ", 1)
            if machine == _identity().rsplit(" ", 1)[0]:
                self._here[rank] = int(number)
        for rank, pid in self._here.items():
            if not _lives(pid) and not has_left(self._store, rank):
                write_failure(self._store, f"rank {rank} on {socket.gethostname()} (pid {pid}) has died", 1)
                mark_left(self._store, rank)
        return read_failure(self._store, self._rank)

    def store_lost(self) -> TrainingStoppedError | None:
        """Returns the error to raise when the store is gone, or None if rank 0 does not host it."""
        return store_lost() if self._hosted_by_rank_0 else None

    def write_failure(self, message: str, exit_code: int) -> None:
        """Reports a failure to the other processes, which then exit, unless one was reported earlier."""
        write_failure(self._store, message, exit_code)

    def activity_requested(self) -> bool:
        """Whether a stalled process has asked what the others are doing."""
        return self._store.check([_ASKED])

    def write_activity(self, line: str) -> None:
        """Writes the activity of this process to the store."""
        self._store.set(f"activity/{self._rank}", line)

    def collect_activities(self, own: str, seconds: float) -> list[str]:
        """Asks all processes what they are doing.

        Args:
            own: activity of this process.
            seconds: to wait for the answers.

        Returns:
            One line per process, including those that did not answer; empty if another process asked first.
        """
        self.write_activity(own)
        speaks = self._store.compare_set(_ASKED, "", str(self._rank)).decode() == str(self._rank)
        end = time.monotonic() + seconds
        keys = {rank: f"activity/{rank}" for rank in range(self._world_size)}
        while time.monotonic() < end and not all(self._store.check([key]) for key in keys.values()):
            time.sleep(0.2)
        if not speaks:
            return []
        return [
            self._store.get(key).decode() if self._store.check([key]) else f"rank {rank}: no answer"
            for rank, key in keys.items()
        ]


def _identity() -> str:
    """Returns the boot id and PID namespace of this machine and the PID of this process."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        machine, namespace = socket.gethostname(), ""
    return f"{machine} {namespace} {os.getpid()}"


def _lives(pid: int) -> bool:
    """Whether a process of this machine is running. Zombies count as dead."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        state = ""
    if state:
        return state not in "ZX"
    try:
        os.kill(pid, 0)  # where there is no /proc
    except ProcessLookupError:
        return False
    return True
