"""Locks an output directory, so that only one run at a time can write to it; the lock file names its holder."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_dist.errors import UserError
from lora_dist.processes.lifetime import at_end

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""Name of the lock file. The file names the holder; only the operating system knows whether the lock is held."""
SAME_HOST_SECONDS = 5.0
"""Seconds to wait for a lock held on this machine, whose holder may be about to exit."""
OTHER_HOST_SECONDS = 100.0
"""Seconds to wait for a holder on another machine: an NFS server keeps the locks of a failed client for 90 s."""

_HELD = {errno.EACCES, errno.EAGAIN, errno.ESTALE}
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_LOCAL = {"nolock", "local_lock=all", "local_lock=posix", "localflock"}
"""Options of NFS and Lustre mounts whose locks hold on one machine only."""


class RunLock:
    """Keeps other runs out of an output directory.

    It is a POSIX record lock: it works over NFS, worker processes do not inherit it, and the system releases it when
    its process dies, in whatever way. It is also released when its process closes any descriptor of the lock file, so
    no other code of a run may open that file.
    """

    def __init__(self, flag: str = "--output_dir", value: Path | None = None) -> None:
        """
        Args:
            flag: the setting that names what is locked, for messages.
            value: its value, for messages; by default the locked directory.
        """
        self._flag, self._value = flag, value
        self._path: Path | None = None
        self._descriptor = -1
        self._made: list[Path] = []

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(
        self, root: Path, to_go_on: str = "repeat this command", other_host_seconds: float = OTHER_HOST_SECONDS
    ) -> None:
        """Takes the lock of a directory, which is created if it does not exist.

        Args:
            root: the directory.
            to_go_on: what a user does after stopping the other run, for the message.
            other_host_seconds: how long to wait for a holder on another machine.

        Raises:
            UserError: another run holds the lock; names host, process and start of that run.
        """
        self._wait_for(root, other_host_seconds, to_go_on)
        at_end(self.release)

    def release(self) -> None:
        """Releases the lock and removes its file, and the directory as well if this run made it and left it empty."""
        if self._path is not None:
            with suppress(OSError):
                # Somebody may have removed the directory, and another run may have created it again.
                if _is_at(self._descriptor, self._path):
                    self._path.unlink()
            # Closed last: as soon as the lock is free, another run may take it.
            os.close(self._descriptor)
            self._path = None
        for directory in self._made:
            with suppress(OSError):
                directory.rmdir()
        self._made = []

    def _wait_for(self, root: Path, other_host_seconds: float, to_go_on: str) -> None:
        self._made = [directory for directory in (root, *root.parents) if not directory.exists()]
        start, said = time.monotonic(), False
        while not self._try(root):
            holder = _read_holder(root / LOCK)
            in_use = f"{self._named(root)} is in use by another run: {_describe(holder)}."
            is_here = holder.get("host", socket.gethostname()) == socket.gethostname()
            seconds = SAME_HOST_SECONDS if is_here else other_host_seconds
            if time.monotonic() - start > seconds:
                raise UserError(
                    f"{in_use} Wait until that run ends, or stop it and {to_go_on}, or choose another {self._flag}."
                )
            if not said:
                logger.warning("%s Waiting up to %.0f s for that process to end", in_use, seconds)
                said = True
            time.sleep(0.2)

    def _try(self, root: Path) -> bool:
        """Tries to take the lock. Warns and returns True if the file system does not support locks."""
        path = root / LOCK
        try:
            root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            # The previous run has just removed the directory.
            return False
        except OSError as error:
            raise UserError(f"{self._named(root)}: cannot open {path} ({error.strerror})") from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(descriptor, path):
                # The previous run has just removed the file, and the next run may lock a new file of this name.
                os.close(descriptor)
                return False
        except OSError as error:
            os.close(descriptor)
            if error.errno in _HELD:
                return False
            if error.errno in _UNSUPPORTED:
                path.unlink(missing_ok=True)
                self._warn(root, f"its file system does not support locks ({error.strerror})", "a second run")
                return True
            raise
        self._path, self._descriptor = path, descriptor
        _write_holder(descriptor)
        with suppress(FileNotFoundError):
            if _locks_are_local(Path("/proc/self/mountinfo").read_text(encoding="utf-8"), root.stat().st_dev):
                self._warn(root, "its file system keeps locks local to this machine", "a run on another machine")
        return True

    def _warn(self, root: Path, why: str, who: str) -> None:
        text = "%s cannot be locked, because %s: %s could use it at the same time"
        logger.warning(text, self._named(root), why, who)

    def _named(self, root: Path) -> str:
        return f"{self._flag} {self._value or root}"


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one under its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    # The lock holds even if a full disk keeps its file empty.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        os.fsync(descriptor)


def _read_holder(path: Path) -> dict[str, Any]:
    """Reads the holder from the lock file; empty if the holder has not written it yet."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(holder: dict[str, Any]) -> str:
    if not {"host", "pid", "started"} <= holder.keys():
        return "its host and process are unknown"
    return f"process {holder['pid']} on {holder['host']}, started {holder['started']}"


def _locks_are_local(mounts: str, device: int) -> bool:
    """Whether the mount of a device says that its locks hold on this machine only.

    Args:
        mounts: content of `/proc/self/mountinfo`.
        device: number of the device.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    # The third field is the device, the last one holds the options of the file system.
    options = [line.split()[-1].split(",") for line in mounts.splitlines() if line.split()[2] == number]
    return any(not _LOCAL.isdisjoint(one) for one in options)
