"""The processes of trials: what they share, why they fail, and a sweep in which all of them fail."""

import os
import time
from pathlib import Path

import pytest
from lora_dist_testing.launching import flags, run

from lora_dist.sweep.trial_process import LOG, TrialProcess
from lora_dist.sweep.trials import environment_of, visible_gpus


def _code_of(job: TrialProcess) -> int:
    while (code := job.exit_code()) is None:
        time.sleep(0.05)
    return code


def test_workers_have_gpus_of_their_own_or_share_them_and_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = [environment_of(worker, 3, ["3", "GPU-1a"]) for worker in range(3)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in shared] == ["3", "GPU-1a", "3"]
    assert {one["LOCAL_WORLD_SIZE"] for one in shared} == {"3"}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    for none in ("", "-1", "0,1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert visible_gpus() == []
        assert environment_of(0, 2, visible_gpus()) == os.environ | {"LOCAL_WORLD_SIZE": "2"}


def test_a_failure_is_told_in_one_line(tmp_path: Path) -> None:
    job = TrialProcess(tmp_path / "run", flags(train_dir=tmp_path / "none"), dict(os.environ))
    assert _code_of(job) == 2
    assert job.failure() == (
        f"1 problem with the settings of lora_dist.train --train_dir: no such directory: {tmp_path / 'none'}"
    )
    (tmp_path / "run" / LOG).write_text("error: first\nTraceback\n  line\nerror: out of memory\nResume\n\n" + "x\n" * 9)
    assert job.failure() == "out of memory Resume x x"
    (tmp_path / "run" / LOG).write_text("Traceback (most recent call last):\n  line\nKeyError: 'a'\n")
    assert job.failure() == "KeyError: 'a'"


def test_a_killed_run_says_by_what(tmp_path: Path) -> None:
    job = TrialProcess(tmp_path / "run", flags(config="demo"), dict(os.environ))
    job.kill()
    assert _code_of(job) == -9
    assert job.failure() == "killed by SIGKILL"


def test_evaluations_are_read_from_whole_lines(tmp_path: Path) -> None:
    job = TrialProcess(tmp_path / "run", flags(train_dir=tmp_path / "none"), dict(os.environ))
    _code_of(job)
    assert job.evaluations("accuracy") == []
    lines = '{"step": 1, "train/loss": 1}\n{"step": 4, "eval/accuracy": 0.5}\n{"step": 8, "eval/accuracy": null}\n{"st'
    (tmp_path / "run" / "metrics.jsonl").write_text(lines)
    first, second = job.evaluations("accuracy")
    assert first == 0.5
    assert second != second
    assert job.evaluations("accuracy") == []


def test_a_sweep_whose_first_trials_fail_ends_with_their_reason(tmp_path: Path) -> None:
    """Each of two settings is possible alone, and no trial is possible with both; other trials do not start."""
    arguments = flags(config="demo", output_dir=tmp_path / "sweep", trials=9, workers=2)
    search = ("--search", "optim=sgd", "adam_beta1=0.8..0.85")
    failed = run("lora_dist.sweep", *arguments, *search, code=1)
    reason = "1 problem with the settings of lora_dist.train --adam_beta1, --optim: sgd does not use --adam_beta1"
    assert f"trial 0 failed: {reason}" in failed.stderr
    assert f"trials have failed, the last one: {reason}" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert len(list((tmp_path / "sweep").glob("trial-*"))) <= 4
    # All that are asked for have failed, and the table is of these.
    shorter = run("lora_dist.sweep", *arguments, *search, "--trials", 3, code=1)
    assert shorter.stdout.count("failed: 1 problem") >= 3
    assert "error: none of the trials is complete" in shorter.stderr


def test_a_launcher_is_refused(tmp_path: Path) -> None:
    refused = run("lora_dist.sweep", *flags(config="demo", output_dir=tmp_path / "x"), code=2, WORLD_SIZE="2")
    assert "start it by python -m lora_dist.sweep" in refused.stderr
