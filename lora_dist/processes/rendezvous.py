"""Rendezvous of the processes before `init_process_group`: a `TCPStore` at MASTER_ADDR:MASTER_PORT.

Under torchrun, and so under `accelerate launch`, the launcher on the first node hosts the store. Otherwise rank 0
hosts it, and `init_process_group` reuses it.
"""

import os
import socket
import threading
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from lora_dist import waiting
from lora_dist.errors import ProcessError, TrainingStoppedError

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

_NEEDED = (
    "Set on every process: WORLD_SIZE (number of processes), RANK (unique, from 0 to WORLD_SIZE - 1; in Slurm "
    "$SLURM_PROCID, in Open MPI $OMPI_COMM_WORLD_RANK), LOCAL_RANK (rank within its node), MASTER_ADDR (the host "
    "of rank 0) and MASTER_PORT (a free port on that host). `accelerate launch` and `torchrun` set all of them."
)
_CONNECT_SECONDS = 5.0
"""Timeout of one connection attempt; a firewall may drop it without a response."""
_LEAST_SECONDS = 2.0
"""Minimum time for the store to answer, even if it is found just before the deadline."""
_IDENTITY = f"{socket.gethostname()} (process {os.getpid()})"
_MARK = uuid.uuid4().hex
_hosted: dict[int, "TCPStore"] = {}
"""Stores that this process hosts, by port; kept until the process ends."""
_hosting = threading.Lock()


class JoinError(ProcessError):
    """This process cannot join the launch. It does not report this to the others; each one detects it by itself."""


class Launch(NamedTuple):
    """The rendezvous settings of a launch of several processes.

    Attributes:
        rank: of this process.
        world_size: number of processes.
        address: host of rank 0.
        port: port on that host.
    """

    rank: int
    world_size: int
    address: str
    port: int

    @classmethod
    def read(cls) -> "Launch | None":
        """Reads the environment variables; returns None for a single process.

        Raises:
            JoinError: a variable is missing or invalid.
        """
        world_size = _number("WORLD_SIZE", 1, 2**31) if "WORLD_SIZE" in os.environ else 1
        if world_size == 1:
            return None
        rank, address = _number("RANK", 0, world_size - 1), os.environ.get("MASTER_ADDR")
        if not address:
            raise JoinError(f"WORLD_SIZE={world_size}, but MASTER_ADDR is not set. {_NEEDED}")
        return cls(rank, world_size, address, _number("MASTER_PORT", 1, 2**16 - 1))

    def is_hosted_by_rank_0(self) -> bool:
        """Whether rank 0, rather than a launcher, hosts the store."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def hosts(self) -> bool:
        """Whether this process hosts the store."""
        return self.rank == 0 and self.is_hosted_by_rank_0()


def _number(name: str, lowest: int, highest: int) -> int:
    text = os.environ.get(name)
    if text is None:
        raise JoinError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {name} is not set. {_NEEDED}")
    if not text.strip().isdecimal() or not lowest <= int(text) <= highest:
        beside = "" if name == "WORLD_SIZE" else f" with WORLD_SIZE={os.environ['WORLD_SIZE']}"
        raise JoinError(f"{name}={text}{beside}: must be an integer from {lowest} to {highest}. {_NEEDED}")
    return int(text)


def launch_store(timeout: timedelta) -> "Store | None":
    """Connects to the store that the processes of this launch share, before and after they have joined.

    Each call opens its own connection, so that threads need not share one. Once the process
    that hosts the store has ended, every use raises a `DistNetworkError`; see `store_lost`.

    Args:
        timeout: limit for connecting to the store and for each request to it.

    Returns:
        None where there is a single process.

    Raises:
        JoinError: the variables of the launch are wrong, the port is taken, the store cannot be reached in time, or
            another process has taken this rank.
        TrainingStoppedError: the process that hosts the store has just ended.
    """
    launch = Launch.read()
    if launch is None:
        return None
    from torch.distributed import DistError, PrefixStore

    if launch.hosts():
        _host(launch)
    client = _connect(launch, timeout.total_seconds())
    # The launcher's store outlives a restart of the processes (torchrun --max-restarts) and keeps earlier failures.
    store = PrefixStore(f"lora_dist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", client)
    try:
        _register(store, launch)
    except DistError as error:
        raise store_lost() from error
    return store


def store_lost() -> TrainingStoppedError:
    """Returns the error to raise when the store is gone; not a usage error, because no setting may be wrong."""
    launch = Launch.read()
    if launch is not None and launch.is_hosted_by_rank_0():
        return TrainingStoppedError("rank 0 has ended or is unreachable; see the log of rank 0 for the reason")
    return TrainingStoppedError("the launcher on the first node has ended; see the log of that node for the reason")


def _host(launch: Launch) -> None:
    """Hosts the store from now on until this process ends."""
    from torch.distributed import DistNetworkError, TCPStore

    with _hosting:
        if launch.port in _hosted:
            return
        try:
            # With `multi_tenant`, `init_process_group` uses the same server.
            _hosted[launch.port] = TCPStore(
                "127.0.0.1", launch.port, is_master=True, wait_for_workers=False, multi_tenant=True
            )
        except DistNetworkError as error:
            reason = str(error).rpartition("message: ")[2]
            raise JoinError(
                f"rank 0 cannot listen on MASTER_PORT={launch.port} of {socket.gethostname()}: {reason}. Another "
                f"run, or a second process with RANK=0, may be using this port. Set another "
                f"MASTER_PORT, the same on all ranks."
            ) from error


def _connect(launch: Launch, seconds: float) -> "TCPStore":
    """Waits for the store, and connects to it."""
    where, deadline = f"{launch.address}:{launch.port}", time.monotonic() + seconds
    host = "rank 0" if launch.is_hosted_by_rank_0() else "the launcher of the first node"
    reason = "no connection attempt yet"

    def message() -> str:
        return f"waiting for {host} at {where}: {reason}; giving up after {seconds:.0f} s"

    # Rank 1 logs as well: on the node of rank 0, the process that usually logs is rank 0, which may not be running.
    with waiting.log_wait(message, launch.rank == 1 or waiting.is_local_main()):
        while (problem := _unreachable(launch)) and time.monotonic() < deadline:
            reason = problem
            time.sleep(min(0.5, seconds / 10))
        client = None
        if not problem:
            reason = "the port is open, but no store answers"
            client = _client(launch, max(_LEAST_SECONDS, deadline - time.monotonic()))
    if client is not None:
        client.set_timeout(timedelta(seconds=seconds))
        return client
    if launch.hosts():
        raise JoinError(
            f"rank 0 listens on port {launch.port}, but cannot connect to itself at {where} within "
            f"{seconds:.0f} s: {reason}. Set MASTER_ADDR to an address of {socket.gethostname()}."
        )
    raise JoinError(
        f"{host} did not answer at {where} within {seconds:.0f} s: {reason}. Check its last log lines, its host "
        f"(MASTER_ADDR) and its port (MASTER_PORT), and that no firewall blocks the port and no other program "
        f"uses it. If rank 0 only starts slowly, raise --ddp_timeout."
    )


def _unreachable(launch: Launch) -> str | None:
    """Returns why a connection to MASTER_ADDR:MASTER_PORT fails, or None if it succeeds."""
    try:
        socket.create_connection((launch.address, launch.port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def _client(launch: Launch, seconds: float) -> "TCPStore | None":
    """Returns a connection to the store, or None if no store answers in time."""
    from torch.distributed import DistError, TCPStore

    found: list[TCPStore] = []

    def connect() -> None:
        try:
            timeout = timedelta(seconds=seconds)
            found.append(TCPStore(launch.address, launch.port, timeout=timeout, wait_for_workers=False))
        except DistError:
            pass

    # In a thread, because torch waits for ever for a server that accepts the connection and says nothing. Where torch
    # does give up, the thread has to end first: one that raises while the interpreter ends aborts the process.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return found[0] if found else None


def _register(store: "Store", launch: Launch) -> None:
    """Registers this process in the store under its rank."""
    mine = f"{_IDENTITY} {_MARK}"
    first = store.compare_set(_key(launch.rank), "", mine).decode()
    if first != mine:
        raise JoinError(
            f"rank {launch.rank} of the launch at {launch.address}:{launch.port} is already taken by "
            f"{first.rpartition(' ')[0]}; this process is {_IDENTITY}. Set a different RANK for each process and a "
            f"different MASTER_PORT for each run on a host. A process that was restarted alone cannot rejoin: "
            f"restart all ranks."
        )
    first = store.compare_set("world size", "", str(launch.world_size)).decode()
    if first != str(launch.world_size):
        raise JoinError(
            f"WORLD_SIZE is {launch.world_size} on rank {launch.rank}, but {first} on another process of the launch at "
            f"{launch.address}:{launch.port}. Set the same WORLD_SIZE on all processes and a different MASTER_PORT for "
            f"each run on a host."
        )


def is_registered(store: "Store", rank: int) -> bool:
    """Whether a process has registered under this rank."""
    return store.check([_key(rank)])


def _key(rank: int) -> str:
    return f"rank/{rank}"
