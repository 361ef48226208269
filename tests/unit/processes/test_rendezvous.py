"""Where the processes of a launch meet: whatever keeps one from it is a sentence, in the time that was given."""

import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from lora_dist_testing.launching import free_port
from torch.distributed import TCPStore

from lora_dist import waiting
from lora_dist.processes import rendezvous
from lora_dist.processes.failure import report_failure
from lora_dist.processes.rendezvous import JoinError, launch_store

HOST = socket.gethostname()


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """That of a launch of two, started by hand; this process is rank 1, the only one of its node."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    free = free_port()
    environment = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (environment | {"MASTER_PORT": str(free)}).items():
        monkeypatch.setenv(name, value)
    return free


@pytest.fixture
def taken(port: int) -> Iterator[socket.socket]:
    """Another program has the port: it accepts connections, and says nothing."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port))
        server.listen()
        yield server


def _refused(seconds: float = 1.0) -> str:
    start = time.monotonic()
    with pytest.raises(JoinError) as error:
        launch_store(timedelta(seconds=seconds))
    assert time.monotonic() - start < seconds + 20
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", None, "WORLD_SIZE=2, but RANK is not set. "),
        ("MASTER_ADDR", None, "WORLD_SIZE=2, but MASTER_ADDR is not set. "),
        ("MASTER_PORT", None, "WORLD_SIZE=2, but MASTER_PORT is not set. "),
        ("RANK", "2", "RANK=2 with WORLD_SIZE=2: must be an integer from 0 to 1. "),
        ("RANK", "-1", "RANK=-1 with WORLD_SIZE=2: must be an integer from 0 to 1. "),
        ("MASTER_PORT", "70000", "MASTER_PORT=70000 with WORLD_SIZE=2: must be an integer from 1 to 65535. "),
        ("WORLD_SIZE", "two", "WORLD_SIZE=two: must be an integer from 1 to "),
    ],
)
@pytest.mark.usefixtures("port")
def test_variables_that_are_missing_or_cannot_be_are_named(
    name: str, value: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    message = _refused()
    assert message.startswith(said)
    assert "MASTER_ADDR (the host of rank 0)" in message


def test_a_port_that_is_taken_is_said_by_rank_0(
    port: int, taken: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    message = _refused()
    assert f"rank 0 cannot listen on MASTER_PORT={port} of {HOST}" in message
    assert "address already in use" in message
    assert "another MASTER_PORT, the same on all ranks" in message


def test_another_program_on_the_port_does_not_hold_a_rank_up_for_ever(port: int, taken: socket.socket) -> None:
    """torch itself waits for ever for its answer."""
    message = _refused()
    assert f"rank 0 did not answer at 127.0.0.1:{port} within 1 s: the port is open, but no store answers" in message
    assert "MASTER_PORT" in message


def test_a_rank_0_that_never_comes_is_waited_for_and_said(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "AFTER_SECONDS", 0.3)
    message = _refused()
    assert f"rank 0 did not answer at 127.0.0.1:{port} within 1 s: connection refused" in message
    assert "raise --ddp_timeout" in message
    waited = f"waiting for rank 0 at 127.0.0.1:{port}: connection refused; giving up after 1 s ("
    assert waited in caplog.text


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.usefixtures("port")
def test_an_address_that_nobody_knows_is_said(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setenv("RANK", rank)
    message = _refused()
    assert "no-such-host.invalid" in message
    assert "MASTER_ADDR" in message
    assert ("rank 0 listens on port" in message) == (rank == "0")


def _other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this is another process than before."""
    monkeypatch.setattr(rendezvous, "_MARK", "another")
    monkeypatch.setattr(rendezvous, "_IDENTITY", "elsewhere (process 1)")


def _ask(changes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> object:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    return launch_store(timedelta(seconds=30))


@pytest.mark.usefixtures("port")
def test_a_rank_that_two_processes_have_is_said_and_its_failure_told_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one may be of another run that was given the same port."""
    store = _ask({"RANK": "0"}, monkeypatch)
    assert isinstance(_ask({"RANK": "1"}, monkeypatch), type(store))
    with monkeypatch.context() as patch:
        _other_process(patch)
        with pytest.raises(
            JoinError, match=rf"^rank 1 .* is already taken by {HOST} \(process \d+\); this process is elsewhere"
        ):
            launch_store(timedelta(seconds=30))
        with pytest.raises(ValueError, match="its own"), report_failure():
            raise ValueError("its own")
    assert not store.check(["failed"])  # type: ignore[attr-defined]


@pytest.mark.usefixtures("port")
def test_processes_that_disagree_about_their_number_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _ask({"RANK": "0"}, monkeypatch)
    with pytest.raises(JoinError, match="WORLD_SIZE is 4 on rank 3, but 2 on another process"):
        _ask({"RANK": "3", "WORLD_SIZE": "4"}, monkeypatch)


@pytest.mark.usefixtures("port")
def test_each_connection_is_of_its_own_and_may_wait_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for an answer does not hold the others up."""
    first, second = (_ask({"RANK": "0"}, monkeypatch) for _ in range(2))
    waits = threading.Thread(target=lambda: first.wait(["later"]))  # type: ignore[attr-defined]
    waits.start()
    time.sleep(0.2)
    start = time.monotonic()
    second.set("later", "now")  # type: ignore[attr-defined]
    assert time.monotonic() - start < 1
    waits.join(5)
    assert not waits.is_alive()


def test_torch_joins_through_the_same_port(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _ask({"RANK": "0"}, monkeypatch)
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True)
    assert store.check(["lora_dist/0/rank/0"])
