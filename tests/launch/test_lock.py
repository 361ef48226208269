"""One run a directory, with real launches: a second run is refused, told who the first is, and takes over after it."""

import json
import signal
import socket
import time
from pathlib import Path

import pytest
from lora_dist_testing.launching import Launch, results_of, run_flags, saved_in, started, train

from lora_dist import predict
from lora_dist.processes import run_lock
from lora_dist.processes.run_lock import LOCK
from lora_dist.train import main

RESUME = ("--resume_from_checkpoint", "auto")
ENDLESS = ("--max_train_steps", 100_000, "--lr_scheduler_type", "constant")


def _arguments(vit: Path, photos: Path, out: Path, *more: object) -> list[str]:
    return [
        *run_flags(
            vit, photos, out, per_device_train_batch_size=4, logging_steps=1, checkpointing_steps=2, eval_steps="no"
        ),
        *map(str, more),
    ]


def _until(launch: Launch, out: Path, step: int) -> None:
    """Waits until a run has saved that update."""
    launch.wait_for(lambda: (out / "checkpoints").is_dir() and saved_in(out)["step"] >= step)


def test_a_run_of_two_processes_keeps_others_out_until_it_is_dead(
    vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "SAME_HOST_SECONDS", 0.5)
    out, together = tmp_path / "run", ("--per_device_train_batch_size", 2)
    main(_arguments(vit, photos, out, "--max_train_steps", 2))
    assert not (out / LOCK).exists()
    arguments = _arguments(vit, photos, out, *ENDLESS, *RESUME, *together)
    with started(tmp_path / "log", *arguments, launch_file="ddp_cpu.yaml") as first:
        _until(first, out, 4)
        pid = first.rank(0).pid
        for one in first.processes():
            one.suspend()  # for the sake of the cores: it holds the lock all the same
        # What is there is read beside it, but no second run goes on, under a launcher or alone.
        predict.main(["--adapter", str(out / "adapter"), "--images", str(photos / "validation")])
        assert capfd.readouterr().out.count("\n") == 9
        refused = f"in use by another run: process {pid} on {socket.gethostname()}, started 20"
        second = train(*arguments, launch_file="ddp_cpu.yaml", code=None)
        assert f"error: --output_dir {out} is {refused}" in second.stderr
        assert "exitcode  : 2" in second.stderr
        for more in (RESUME, (), ("--do_eval_only", "--adapter_name_or_path", out / "adapter")):
            with pytest.raises(SystemExit) as end:
                main(_arguments(vit, photos, out, *more))
            assert end.value.code == 2
            assert refused in capfd.readouterr().err
        for one in first.processes():
            one.resume()
        _until(first, out, saved_in(out)["step"] + 2)
        for one in first.processes():
            one.send_signal(signal.SIGKILL)
        first.wait()
    assert json.loads((out / LOCK).read_text())["pid"] == pid
    last = saved_in(out)["step"] + 2
    main(_arguments(vit, photos, out, *RESUME, "--max_train_steps", last, "--lr_scheduler_type", "constant"))
    assert results_of(out)["step"] == last
    assert not (out / LOCK).exists()


def test_of_two_runs_that_start_together_in_a_new_directory_one_is_refused(
    vit: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = _arguments(vit, photos, out, *ENDLESS)
    with started(tmp_path / "one", *arguments) as one, started(tmp_path / "two", *arguments) as two:
        while one.process.poll() is None and two.process.poll() is None:
            time.sleep(0.1)
        loser, winner = (one, two) if one.process.poll() is not None else (two, one)
        assert loser.process.returncode == 2
        assert f"is in use by another run: process {winner.process.pid} on" in loser.text
        _until(winner, out, 2)
