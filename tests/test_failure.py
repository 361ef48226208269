"""A process that fails is named by those that wait for it, at once."""

import socket
import time
from datetime import timedelta

import pytest
from accelerate import Accelerator
from torch.distributed import TCPStore

from lora_dist import train
from lora_dist.errors import PreemptedError, ProcessError, UserError
from lora_dist.processes.failure import launch_store, others_told, told_failure
from lora_dist.processes.preflight import Preflight
from lora_dist.processes.runtime import launch


@pytest.fixture
def alone() -> Accelerator:
    """Made before there seems to be a launch to join."""
    return launch("no")


@pytest.fixture
def store(alone: Accelerator, monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """That of a launch of three, as its launcher has it; this process is rank 2 of them, the first on its node."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port),
        "WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "0",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return server


def _fail(error: Exception) -> None:
    with others_told():
        raise error


def _wait(monkeypatch: pytest.MonkeyPatch, seconds: float = 60) -> UserError:
    """What rank 0 ends with, which waits for the others."""
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError) as end:
        Preflight(timedelta(seconds=seconds)).arrive("somewhere")
    return end.value


@pytest.mark.parametrize(
    ("error", "said"), [(UserError("no such disk"), "no such disk"), (ValueError("odd"), "ValueError: odd")]
)
@pytest.mark.usefixtures("store")
def test_those_that_wait_name_it_and_end_at_once(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)):
        _fail(error)
    start = time.monotonic()
    assert str(_wait(monkeypatch)) == f"rank 2 on {socket.gethostname()} failed: {said}"
    assert time.monotonic() - start < 5


@pytest.mark.usefixtures("store")
def test_a_mistake_in_the_settings_of_one_node_is_said_there_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its data is not mounted."""
    with pytest.raises(SystemExit) as end:
        train.main(["--train_dir", "/nowhere", "--output_dir", "/nowhere/run"])
    assert end.value.code == 2
    host = socket.gethostname()
    assert f"error: rank 2 on {host}: " in capsys.readouterr().err
    assert str(_wait(monkeypatch)).startswith(f"rank 2 on {host} failed: ")
    assert "/nowhere" in str(_wait(monkeypatch))


def test_the_first_failure_is_the_one_that_is_told(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, message in (("1", "the cause"), ("2", "what comes of it")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UserError):
            _fail(UserError(message))
    assert told_failure(store) == f"rank 1 on {socket.gethostname()} failed: the cause"


def test_what_all_know_of_is_not_told(store: TCPStore) -> None:
    with pytest.raises(PreemptedError):
        _fail(PreemptedError("stopped"))
    assert told_failure(store) is None


def test_others_are_held_back_until_the_first_has_been_there(
    store: TCPStore, alone: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    second = Preflight(timedelta(seconds=0.3))
    with pytest.raises(ProcessError, match="rank 0 of 3 did not arrive"), second.first_process_first("x", alone):
        raise AssertionError
    monkeypatch.setenv("RANK", "0")
    with Preflight(timedelta(seconds=1)).first_process_first("x", alone):
        pass
    with second.first_process_first("x", alone):
        store.set("been there", "yes")
    assert store.check(["been there"])


def test_a_first_process_that_fails_lets_nobody_pass(
    store: TCPStore, alone: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    first = Preflight(timedelta(seconds=60))
    with pytest.raises(UserError), others_told(), first.first_process_first("x", alone):
        raise UserError("no data")
    monkeypatch.setenv("RANK", "1")
    with (
        pytest.raises(UserError, match=r"rank 0 on .* failed: no data"),
        Preflight(timedelta(seconds=60)).first_process_first("x", alone),
    ):
        raise AssertionError
    assert not store.check(["x/0"])


def test_a_single_process_has_nobody_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert launch_store(timedelta(seconds=1)) is None
    with pytest.raises(UserError, match=r"^alone$"):
        _fail(UserError("alone"))
    Preflight(timedelta(seconds=1)).arrive("somewhere")
