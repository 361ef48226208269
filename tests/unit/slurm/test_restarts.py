"""When a crashed job starts again, from real records and logs, without Slurm; tests/slurm shows it on a cluster."""

import subprocess
from pathlib import Path

import pytest

RESTARTS = Path(__file__).parents[3] / "slurm" / "restarts.sh"


def _call(log_dir: Path, function: str, restart: int = 0, **variables: str) -> tuple[bool, str]:
    """Calls a function as train.sbatch does; returns whether it succeeds, and what it says and why."""
    log_dir.mkdir(exist_ok=True)
    script = (
        f'say() {{ echo "$*"; }}\nreason=\n. "{RESTARTS}"\nif {function}; then code=0; else code=1; fi\necho "$reason"'
    )
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{script}\nexit $code"],
        env={"PATH": "/usr/bin:/bin", "LOG_DIR": str(log_dir), "SLURM_RESTART_COUNT": str(restart)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode == 0, result.stdout.strip()


def _save(log_dir: Path, *updates: int) -> None:
    with (log_dir / "rank-0.log").open("a", encoding="utf-8") as log:
        log.writelines(
            f"step {update}/500  epoch 1.00\nsaved a checkpoint after update {update}\n" for update in updates
        )


def test_crashes_are_counted_over_the_starts_of_a_job(tmp_path: Path) -> None:
    logs = tmp_path / "it's a place"
    for restart in range(4):
        assert _call(logs, "begin_start", restart) == (True, "")
        _save(logs, 10 * restart + 9, 10 * restart + 10)
        again, reason = _call(logs, "crashed", restart)
        if restart < 3:
            assert (again, reason) == (
                True,
                f"a checkpoint was saved since the last start (crash {restart + 1} of at most 3)",
            )
    assert (again, reason) == (False, "crash 4 of the job exceeds MAX_CRASH_RESTARTS=3")


@pytest.mark.parametrize("saved", [(), (100, 120), (120,)])
def test_a_crash_without_a_newer_checkpoint_is_not_worth_another_start(saved: tuple[int, ...], tmp_path: Path) -> None:
    """One that a run saves again, having gone on from it, is no progress."""
    _call(tmp_path, "begin_start")
    _save(tmp_path, 100, 120)
    assert _call(tmp_path, "crashed")[0]
    _call(tmp_path, "begin_start", 1)
    _save(tmp_path, *saved)
    assert _call(tmp_path, "crashed", 1) == (False, "no checkpoint was saved since the last start")


@pytest.mark.parametrize(("most", "again"), [("0", False), ("1", True), ("none", False), ("-1", False)])
def test_the_bound_is_set_by_a_variable(most: str, again: bool, tmp_path: Path) -> None:
    _call(tmp_path, "begin_start")
    _save(tmp_path, 10)
    assert _call(tmp_path, "crashed", MAX_CRASH_RESTARTS=most)[0] is again


def test_a_start_without_an_end_counts_as_a_crash(tmp_path: Path) -> None:
    """As a node that fails leaves it behind; once with progress, and once without."""
    begun = "the previous start did not end properly: a node failed or the job was killed"
    _call(tmp_path, "begin_start")
    _save(tmp_path, 10)
    going_on, text = _call(tmp_path, "begin_start", 1)
    assert going_on
    assert f"{begun}; a checkpoint was saved since the last start (crash 1 of at most 3): resuming" in text
    going_on, text = _call(tmp_path, "begin_start", 2)
    assert not going_on
    assert f"{begun}; no checkpoint was saved since the last start: not restarted" in text
    # Somebody requeues it by hand.
    assert _call(tmp_path, "begin_start", 3) == (True, "")


@pytest.mark.parametrize("end", ["stopped", "told to end", "finished", "failed"])
def test_an_end_that_is_no_crash_does_not_count(end: str, tmp_path: Path) -> None:
    for restart in range(5):
        assert _call(tmp_path, "begin_start", restart) == (True, "")
        assert _call(tmp_path, f"record '{end}'", restart) == (True, "")
    _save(tmp_path, 10)
    assert _call(tmp_path, "crashed", 4) == (True, "a checkpoint was saved since the last start (crash 1 of at most 3)")


def test_a_job_whose_number_comes_again_begins_anew(tmp_path: Path) -> None:
    _call(tmp_path, "begin_start")
    assert _call(tmp_path, "begin_start") == (True, "")
    assert (tmp_path / "starts").read_text(encoding="utf-8") == "started, newest checkpoint 0\n"
