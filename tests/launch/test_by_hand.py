"""Launches without a launcher, as PyTorchJob, mpirun and srun make them: variables set for each process by hand."""

import socket
import subprocess
import sys
from pathlib import Path

from lora_dist_testing.launching import TIMEOUT, environment, flags, free_port, results_of

SCRIPT = """
import os, time
from datetime import timedelta
from lora_dist import waiting
from lora_dist.errors import exit_on_user_error
from lora_dist.processes import failure

@exit_on_user_error
def main(rank):
    waiting.AFTER_SECONDS, failure.TELLING_SECONDS = {after}, {telling}
    with failure.others_told():
        from lora_dist.processes.preflight import Preflight
        preflight = Preflight(timedelta(seconds={seconds}))
        {main}

main(int(os.environ["RANK"]))
"""


def _by_hand(
    *command: object, ranks: tuple[int, ...] = (0, 1), world_size: int = 2, **extra: str
) -> list[tuple[int, str]]:
    """Starts a command once for each rank; returns their exit codes and what they said."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="localhost", MASTER_PORT=port)
            | extra,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ranks
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def _script(path: Path, main: str, **values: float) -> Path:
    path.write_text(SCRIPT.format_map({"seconds": 60, "after": 10, "telling": 30, "main": main} | values))
    return path


def test_two_processes_started_by_hand_train_together(vit: Path, photos: Path, tmp_path: Path) -> None:
    ended = _by_hand(
        "-m",
        "lora_dist.train",
        *flags(
            model_name_or_path=vit,
            train_dir=photos / "train",
            output_dir=tmp_path / "run",
            max_train_steps=2,
            ddp_timeout=60,
        ),
    )
    assert [code for code, _ in ended] == [0, 0], ended
    assert "2 processes; an all-reduce of 4 MiB takes" in ended[0][1]
    assert results_of(tmp_path / "run")["num_processes"] == 2


def test_a_rank_that_never_comes_is_named_first_as_waited_for_and_then_as_missing(tmp_path: Path) -> None:
    script = _script(tmp_path / "script.py", "preflight.arrive('started')", seconds=8, after=5, telling=5)
    one, two = _by_hand(script, ranks=(0, 2), world_size=4)
    assert [one[0], two[0]] == [2, 2], (one, two)
    host = socket.gethostname()
    assert "waiting for rank 1, 3 of 4 (stage: started); giving up after 8 s (" in one[1]
    assert f"error: rank 1, 3 of 4 did not arrive within 8 s. Arrived: 0 on {host}, 2 on {host}. " in one[1]
    assert "Traceback" not in one[1] + two[1]


def test_a_crash_is_told_with_its_exit_code_by_the_first_rank_as_well(tmp_path: Path) -> None:
    """It hosts the store, and is long done when the other one starts."""
    script = _script(tmp_path / "script.py", "1 / 0 if rank == 0 else preflight.arrive('started')")
    script.write_text("import os, time\ntime.sleep(3 * (os.environ['RANK'] == '1'))\n" + script.read_text())
    one, two = _by_hand(script)
    assert [one[0], two[0]] == [1, 1], (one, two)
    assert f"error: rank 1 on {socket.gethostname()}: rank 0 on {socket.gethostname()} failed: ZeroDivision" in two[1]
    assert "Traceback" not in two[1]


def test_a_first_rank_that_is_killed_leaves_a_sentence_and_the_code_of_a_crash(tmp_path: Path) -> None:
    main = "os.kill(os.getpid(), 9) if rank == 0 and not time.sleep(5) else preflight.arrive('started')"
    one, two = _by_hand(_script(tmp_path / "script.py", main))
    assert [one[0], two[0]] == [-9, 1], (one, two)
    assert "rank 0 has ended, or is out of reach, and with it this launch; its log says why" in two[1]
    assert "Traceback" not in two[1]
    assert "frame #" not in two[1]


def test_processes_that_meet_and_cannot_connect_say_what_to_look_at(tmp_path: Path) -> None:
    main = "from lora_dist.processes.runtime import launch; launch('no', 60)"
    one, two = _by_hand(_script(tmp_path / "script.py", main), GLOO_SOCKET_IFNAME="no-such-interface")
    assert [one[0], two[0]] == [2, 2], (one, two)
    for _, said in (one, two):
        assert "all 2 processes have arrived, but this one could not connect to the others: " in said
        assert "no-such-interface" in said
        assert "GLOO_SOCKET_IFNAME" in said
        assert "Traceback" not in said
