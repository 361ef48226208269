"""The other processes of a launch, seen through its store: whether they live, and what they are doing."""

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lora_dist.errors import TrainingStoppedError, UserError
from lora_dist.processes.failure import RankFailedError, tell_failure, told_failure
from lora_dist.processes.rendezvous import Launch, launch_store, lost

if TYPE_CHECKING:
    from torch.distributed import Store

_ASKED = "activity/asked"


class Peers:
    """The processes of this launch. For one thread at a time: it has a connection to the store of its own."""

    def __init__(self, store: "Store") -> None:
        """
        Args:
            store: of the launch.
        """
        self._store = store
        launch = Launch.read()
        self._hosted_by_rank_0 = launch is not None and launch.is_hosted_by_rank_0()
        self._rank, self._world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        first = self._rank - int(os.environ.get("LOCAL_RANK", "0"))
        here = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        # Launchers may number ranks otherwise; then these are elsewhere, as their identities say.
        self._maybe_here = [rank for rank in here if rank != self._rank]
        self._here: dict[int, int] = {}
        store.set(f"process/{self._rank}", _identity())

    @classmethod
    def of_launch(cls, timeout: timedelta) -> Self | None:
        """The processes of this launch; None for a single one, or where the store is gone."""
        with suppress(RuntimeError, OSError, UserError):
            store = launch_store(timeout)
            return None if store is None else cls(store)
        return None

    def leave(self) -> None:
        """Tells the others that this process ends as agreed with them."""
        with suppress(RuntimeError, OSError):
            self._store.set(f"left/{self._rank}", "")

    def failure(self) -> RankFailedError | None:
        """The first failure of another process: one that was told, or the death of one on this machine."""
        for rank in [rank for rank in self._maybe_here if self._store.check([f"process/{rank}"])]:
            self._maybe_here.remove(rank)
            machine, number = self._store.get(f"process/{rank}").decode().rsplit(" ", 1)
            if machine == _identity().rsplit(" ", 1)[0]:
                self._here[rank] = int(number)
        for rank, pid in self._here.items():
            if not _lives(pid) and not self._store.check([f"left/{rank}"]):
                tell_failure(self._store, f"rank {rank} on {socket.gethostname()} (pid {pid}) has died", 1)
        return told_failure(self._store, self._rank)

    def lost(self) -> TrainingStoppedError | None:
        """What it means that the store is gone: the end of rank 0, where that hosts it."""
        return lost() if self._hosted_by_rank_0 else None

    def tell_failure(self, message: str, exit_code: int) -> None:
        """Has the other processes end with this failure, unless another one was first."""
        tell_failure(self._store, message, exit_code)

    def asked_for_activity(self) -> bool:
        """Whether a process has stalled and wants to know what the others are doing."""
        return self._store.check([_ASKED])

    def tell_activity(self, line: str) -> None:
        """Says what this process is doing."""
        self._store.set(f"activity/{self._rank}", line)

    def activities(self, own: str, seconds: float) -> list[str]:
        """Asks all processes what they are doing.

        Args:
            own: what this one does.
            seconds: to wait for the answers.

        Returns:
            A line for each process, those that did not answer included; none where another process has asked before.
        """
        self.tell_activity(own)
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
    """The machine, as far as process numbers count there, and the number of this process."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        machine, namespace = socket.gethostname(), ""
    return f"{machine} {namespace} {os.getpid()}"


def _lives(pid: int) -> bool:
    """Whether a process of this machine runs. One that has died exists until its parent asks for its exit code."""
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
