"""A process that fails is named by those that wait for it, at once."""

import socket
import threading
import time
from datetime import timedelta

import pytest
from accelerate import Accelerator
from torch.distributed import TCPStore

from lora_dist import train
from lora_dist.errors import PreemptedError, ProcessError, TrainingStoppedError, UserError
from lora_dist.processes.failure import read_failure, report_failure
from lora_dist.processes.preflight import Preflight
from lora_dist.processes.rendezvous import launch_store
from lora_dist.processes.runtime import launch


def _launch_of_three(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "3",
        "RANK": "2",
        "LOCAL_RANK": "0",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def alone() -> Accelerator:
    """Made before there seems to be a launch to join."""
    return launch("no")


@pytest.fixture
def store(alone: Accelerator, monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """That of a launch of three, as its launcher has it; this process is rank 2 of them, the first on its node."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _launch_of_three(server.port, monkeypatch)
    return server


def _fail(error: Exception) -> None:
    with report_failure():
        raise error


def _wait(monkeypatch: pytest.MonkeyPatch, seconds: float = 60) -> UserError:
    """What rank 0 ends with, which waits for the others."""
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError) as end:
        Preflight(timedelta(seconds=seconds)).arrive("somewhere")
    return end.value


class _OddError(UserError):
    exit_code = 77


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (UserError("no such disk"), "no such disk", 2),
        (_OddError("odd"), "odd", 77),
        (ValueError("odd"), "ValueError: odd", 1),
    ],
)
@pytest.mark.usefixtures("store")
def test_those_that_wait_name_it_and_end_at_once_with_its_exit_code(
    error: Exception, said: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler starts a run again after a crash, and not after a mistake of its user."""
    with pytest.raises(type(error)):
        _fail(error)
    start = time.monotonic()
    end = _wait(monkeypatch)
    assert str(end) == f"rank 2 on {socket.gethostname()} failed: {said}"
    assert end.exit_code == code
    # Of the 60 s that it would wait; looking up the name of a host can take 5 s.
    assert time.monotonic() - start < 20


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


def _told() -> str:
    store = launch_store(timedelta(seconds=30))
    assert store is not None
    return str(read_failure(store))


@pytest.mark.usefixtures("store")
def test_the_first_failure_is_the_one_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, message in (("1", "the cause"), ("2", "what comes of it")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UserError):
            _fail(UserError(message))
    assert _told() == f"rank 1 on {socket.gethostname()} failed: the cause"


@pytest.mark.usefixtures("store")
def test_what_all_know_of_is_not_told() -> None:
    with pytest.raises(PreemptedError):
        _fail(PreemptedError("stopped"))
    assert _told() == "None"


@pytest.mark.usefixtures("store")
def test_what_was_told_before_a_restart_is_not_told_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's store outlives the processes that it starts again (torchrun --max-restarts)."""
    with pytest.raises(UserError):
        _fail(UserError("a node was lost"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert _told() == "None"


def test_a_launcher_that_is_gone_is_a_sentence_and_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    server = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    _launch_of_three(server[0].port, monkeypatch)
    preflight = Preflight(timedelta(seconds=60))
    threading.Timer(0.3, server.clear).start()
    with pytest.raises(TrainingStoppedError, match="the launcher on the first node has ended") as end:
        preflight.arrive("somewhere")
    assert end.value.exit_code == 1


def test_others_are_held_back_until_the_first_has_been_there(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    second = Preflight(timedelta(seconds=0.3))
    with pytest.raises(ProcessError, match="rank 0 of 3 did not arrive"), second.first_process_first("x"):
        raise AssertionError
    monkeypatch.setenv("RANK", "0")
    with Preflight(timedelta(seconds=1)).first_process_first("x"):
        pass
    with second.first_process_first("x"):
        store.set("been there", "yes")
    assert store.check(["been there"])


def test_a_first_process_that_fails_lets_nobody_pass(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    first = Preflight(timedelta(seconds=60))
    with pytest.raises(UserError), report_failure(), first.first_process_first("x"):
        raise UserError("no data")
    monkeypatch.setenv("RANK", "1")
    with (
        pytest.raises(UserError, match=r"rank 0 on .* failed: no data"),
        Preflight(timedelta(seconds=60)).first_process_first("x"),
    ):
        raise AssertionError
    assert not store.check(["x/0"])


def test_a_single_process_has_nobody_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert launch_store(timedelta(seconds=1)) is None
    with pytest.raises(UserError, match=r"^alone$"):
        _fail(UserError("alone"))
    Preflight(timedelta(seconds=1)).arrive("somewhere")
