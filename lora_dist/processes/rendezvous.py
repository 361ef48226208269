"""Where the processes of a launch meet before they have joined: a store at MASTER_ADDR:MASTER_PORT.

Under torchrun, and so under `accelerate launch`, the launcher of the first node hosts it. In any other launch rank 0
does, and torch shares it when it joins the processes.
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
    "Every process needs WORLD_SIZE (how many there are), RANK (from 0 to WORLD_SIZE - 1, each once; in Slurm "
    "$SLURM_PROCID, under Open MPI $OMPI_COMM_WORLD_RANK), LOCAL_RANK (its number on its host), MASTER_ADDR (the host "
    "of rank 0) and MASTER_PORT (a free port there). `accelerate launch` and `torchrun` set all of them."
)
_CONNECT_SECONDS = 5.0
"""For one attempt to connect, which a firewall may leave without an answer."""
_LEAST_SECONDS = 2.0
"""For the answer of a store that is found in the last moment."""
_IDENTITY = f"{socket.gethostname()} (process {os.getpid()})"
_MARK = uuid.uuid4().hex
_hosted: dict[int, "TCPStore"] = {}
"""The store that this process hosts, by port, until it ends."""
_hosting = threading.Lock()


class JoinError(ProcessError):
    """This process cannot be part of its launch. It has nobody to tell: each process finds that out by itself."""


class Launch(NamedTuple):
    """What the variables of a launch of several processes say.

    Attributes:
        rank: of this process.
        world_size: number of processes.
        address: host of rank 0.
        port: there.
    """

    rank: int
    world_size: int
    address: str
    port: int

    @classmethod
    def read(cls) -> "Launch | None":
        """From the environment; None where there is a single process.

        Raises:
            JoinError: a variable is missing, or has a value that it cannot have.
        """
        world_size = _number("WORLD_SIZE", 1, 2**31) if "WORLD_SIZE" in os.environ else 1
        if world_size == 1:
            return None
        rank, address = _number("RANK", 0, world_size - 1), os.environ.get("MASTER_ADDR")
        if not address:
            raise JoinError(f"WORLD_SIZE={world_size}, but MASTER_ADDR is not set. {_NEEDED}")
        return cls(rank, world_size, address, _number("MASTER_PORT", 1, 2**16 - 1))

    def is_hosted_by_rank_0(self) -> bool:
        """Whether no launcher hosts the store."""
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
        raise JoinError(f"{name}={text}{beside}: has to be a number from {lowest} to {highest}. {_NEEDED}")
    return int(text)


def launch_store(timeout: timedelta) -> "Store | None":
    """Connects to the store that the processes of this launch share, before and after they have joined.

    Each call makes a connection of its own, which may be used from another thread than the others. Once the process
    that hosts the store has ended, every use raises a `DistNetworkError`; see `lost`.

    Args:
        timeout: to wait for the store to be there, and for each answer of it.

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
    # The launcher's store outlives a restart of the processes (torchrun --max-restarts), and what failed before it.
    store = PrefixStore(f"lora_dist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", client)
    try:
        _register(store, launch)
    except DistError as error:
        raise lost() from error
    return store


def lost() -> TrainingStoppedError:
    """What a process ends with when the store is gone. Nothing says that a setting was wrong."""
    launch = Launch.read()
    if launch is not None and launch.is_hosted_by_rank_0():
        return TrainingStoppedError("rank 0 has ended, or is out of reach, and with it this launch; its log says why")
    return TrainingStoppedError("the launcher on the first node has ended; its log says why")


def _host(launch: Launch) -> None:
    """Hosts the store from now on until this process ends."""
    from torch.distributed import DistNetworkError, TCPStore

    with _hosting:
        if launch.port in _hosted:
            return
        try:
            # Several tenants: torch takes the same server when it joins the processes.
            _hosted[launch.port] = TCPStore(
                "127.0.0.1", launch.port, is_master=True, wait_for_workers=False, multi_tenant=True
            )
        except DistNetworkError as error:
            reason = str(error).rpartition("message: ")[2]
            raise JoinError(
                f"rank 0 cannot listen on port {launch.port} of {socket.gethostname()}, where the processes of this "
                f"launch meet: {reason}. If another run has it, or a second process with RANK=0, choose another "
                f"MASTER_PORT, the same for all ranks."
            ) from error


def _connect(launch: Launch, seconds: float) -> "TCPStore":
    """Waits for the store, and connects to it."""
    where, deadline = f"{launch.address}:{launch.port}", time.monotonic() + seconds
    host = "rank 0" if launch.is_hosted_by_rank_0() else "the launcher of the first node"
    reason = "not asked yet"

    def message() -> str:
        return f"waiting for {host} at {where}: {reason}; giving up after {seconds:.0f} s"

    # Rank 1 may be on the node of rank 0, where the process that else speaks is the one that is waited for.
    with waiting.told(message, launch.rank == 1 or waiting.speaks_for_its_node()):
        while (problem := _unreachable(launch)) and time.monotonic() < deadline:
            reason = problem
            time.sleep(min(0.5, seconds / 10))
        client = None
        if not problem:
            reason = "what listens there does not answer"
            client = _client(launch, max(_LEAST_SECONDS, deadline - time.monotonic()))
    if client is not None:
        client.set_timeout(timedelta(seconds=seconds))
        return client
    if launch.hosts():
        raise JoinError(
            f"this is rank 0 and it listens on port {launch.port}, but does not reach itself at {where} within "
            f"{seconds:.0f} s: {reason}. MASTER_ADDR has to be an address of {socket.gethostname()}."
        )
    raise JoinError(
        f"{host} did not answer at {where} within {seconds:.0f} s: {reason}. See what it logged last. Is that its host "
        f"(MASTER_ADDR) and its port (MASTER_PORT), is the port open between the hosts, and does no other program "
        f"listen there? If rank 0 is only slow to start, raise --ddp_timeout."
    )


def _unreachable(launch: Launch) -> str | None:
    """Why nobody can be reached at the address of the launch; None if somebody can."""
    try:
        socket.create_connection((launch.address, launch.port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def _client(launch: Launch, seconds: float) -> "TCPStore | None":
    """A connection to the store, or None if what listens there does not answer as one in time."""
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
    """Takes the rank of this process in the store."""
    mine = f"{_IDENTITY} {_MARK}"
    first = store.compare_set(_key(launch.rank), "", mine).decode()
    if first != mine:
        raise JoinError(
            f"rank {launch.rank} of the launch at {launch.address}:{launch.port} is already "
            f"{first.rpartition(' ')[0]}, and this is {_IDENTITY}. Give each process a RANK of its own, and each run "
            f"on a host a MASTER_PORT of its own. A process that takes the place of one that has ended cannot join: "
            f"start all ranks again."
        )
    first = store.compare_set("world size", "", str(launch.world_size)).decode()
    if first != str(launch.world_size):
        raise JoinError(
            f"WORLD_SIZE={launch.world_size} for rank {launch.rank}, but {first} for another process of the launch at "
            f"{launch.address}:{launch.port}. Give all of them the same, and each run on a host a MASTER_PORT of its "
            f"own."
        )


def is_registered(store: "Store", rank: int) -> bool:
    """Whether a rank has been in the store."""
    return store.check([_key(rank)])


def _key(rank: int) -> str:
    return f"rank/{rank}"
