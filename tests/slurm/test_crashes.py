"""Jobs that crash on a real cluster: which of them Slurm starts again, how often, and what the job's log says."""

from pathlib import Path

import pytest
from lora_dist_testing.cluster import SCRIPTS, START_UP, Cluster, log_of, user_environment
from lora_dist_testing.launching import ROOT, flags

pytestmark = pytest.mark.root

SLURMD_TIMEOUT = 10

FAILING = """
import ctypes, os, threading, time
from pathlib import Path

def fail(main, file, how):
    while not file.exists():
        time.sleep(0.05)
    if how == "stall":
        os._exit(124)
    from lora_dist.errors import ProcessError
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(ProcessError))

# Read here, because accelerate empties the environment for moments.
if os.environ.get("RANK") == "1":
    file = Path(os.environ["FAIL"])
    threading.Thread(target=fail, args=(threading.get_ident(), file, os.environ["FAIL_WITH"]), daemon=True).start()
"""
"""Makes rank 1 end with the code of a stall, or with a `UserError` of its own, once a file is there."""


class Job:
    """A training of two nodes without end, and what becomes of it."""

    def __init__(
        self, cluster: Cluster, directory: Path, script: list[object], data_flags: list[object], **extra: str
    ) -> None:
        """
        Args:
            cluster: where it runs.
            directory: where it is submitted; its `settings.yaml` is read at each start.
            script: options of sbatch, a script and its arguments.
            data_flags: flags that name the model and the data.
            extra: variables.
        """
        self._cluster, self._place = cluster, directory
        self.set(max_train_steps=1_000_000, checkpointing_steps=10)
        self.number = cluster.submit(
            "--nodes=2",
            "--time=10",
            *script,
            *data_flags,
            *flags(config=directory / "settings.yaml", logging_steps=1, eval_steps="no", dataloader_num_workers=0),
            cwd=directory,
            **user_environment(PROJECT_DIR=str(ROOT), **extra),
        )

    def set(self, **settings: object) -> None:
        """Changes settings from the next start on."""
        text = "".join(f"{name}: {value}\n" for name, value in settings.items())
        (self._place / "settings.yaml").write_text(text, encoding="utf-8")

    @property
    def log(self) -> str:
        return log_of(self.number, self._place)

    def says(self, text: str, start: int = 0) -> None:
        """Waits for a text in the job's log, after the beginning of a start."""
        self._cluster.wait_for(
            lambda: text in self.log.partition(f": start {start} on ")[2],
            lambda: f"no {text!r} in\n{self.log}",
            START_UP,
        )

    def reaches(self, **fields: str) -> None:
        """Waits for what Slurm says of it."""
        self._cluster.wait_for(
            lambda: all(self.field(name) == value for name, value in fields.items()), lambda: self.log, START_UP
        )

    def field(self, name: str) -> str:
        return self._cluster.field(self.number, name)


@pytest.fixture
def data_flags(vit: Path, photos: Path) -> list[object]:
    return ["--model_name_or_path", vit, "--train_dir", photos / "train", "--validation_dir", photos / "validation"]


SAVED = "saved a checkpoint after update "


def test_a_crash_after_a_checkpoint_is_requeued_and_one_without_a_checkpoint_is_not(
    cluster: Cluster, directory: Path, data_flags: list[object]
) -> None:
    """The task of an array, whose job number is that of the array: it loses a process, goes on, and loses it again."""
    (directory / "grid.txt").write_text("--learning_rate 1e-3\n", encoding="utf-8")
    job = Job(cluster, directory, ["--array=1", SCRIPTS / "sweep.sbatch", "grid.txt", "runs"], data_flags)
    job.number += "_1"
    job.says(SAVED)
    job.set(max_train_steps=1_000_000, checkpointing_steps="no")
    cluster.rank(1).kill()
    job.says("step ", start=1)
    cluster.rank(1).kill()
    job.reaches(JobState="FAILED")
    assert job.field("Restarts") == "1"
    assert job.log.count("resuming from runs/1/checkpoints/step-") == 1
    assert (
        "crashed with code 1; a checkpoint was saved since the last start (crash 1 of at most 3): requeued" in job.log
    )
    assert "crashed with code 1; no checkpoint was saved since the last start: not requeued" in job.log


def _failing(cluster: Cluster, directory: Path, data_flags: list[object], failure: str) -> tuple[Job, Path]:
    """A job that has saved a checkpoint and now fails; and the file that makes it fail."""
    (directory / "sitecustomize.py").write_text(FAILING, encoding="utf-8")
    fail = directory / "fail"
    command = [SCRIPTS / "train.sbatch", "--output_dir", "run"]
    environment = {"PYTHONPATH": f"{directory}:{ROOT}", "FAIL": str(fail), "FAIL_WITH": failure}
    job = Job(cluster, directory, command, data_flags, **environment)
    job.says(SAVED)
    fail.touch()
    return job, fail


@pytest.mark.slow
def test_an_error_of_the_user_is_not_requeued(cluster: Cluster, directory: Path, data_flags: list[object]) -> None:
    """Although there is a checkpoint, and the other node ends with another code because of it."""
    job, _ = _failing(cluster, directory, data_flags, "error")
    job.reaches(JobState="FAILED")
    assert (job.field("Restarts"), job.field("ExitCode")) == ("0", "2:0")
    assert "ended with code 2, an error in settings, data or model: not requeued" in job.log


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_fails_counts_as_a_crash(cluster: Cluster, directory: Path, data_flags: list[object]) -> None:
    """First the other node, after which the run goes on; then the one of the batch script, where the bound is reached.

    Slurm requeues the job by itself both times. When the job has failed, somebody requeues it by hand.
    """
    job = Job(cluster, directory, [SCRIPTS / "train.sbatch", "--output_dir", "run"], data_flags, MAX_CRASH_RESTARTS="1")
    job.says(SAVED)
    cluster.fail_node("n2")
    job.reaches(Restarts="1")
    cluster.start_node("n2")
    job.says("resuming from run/checkpoints/step-", start=1)
    job.says(SAVED, start=1)
    cluster.fail_node("n1")
    job.reaches(Restarts="2")
    cluster.start_node("n1")
    job.reaches(JobState="FAILED")
    begun = "the previous start did not end properly: a node failed or the job was killed; "
    assert "a node of the job is down" in job.log
    assert f"{begun}a checkpoint was saved since the last start (crash 1 of at most 1): resuming" in job.log
    assert f"{begun}crash 2 of the job exceeds MAX_CRASH_RESTARTS=1: not restarted" in job.log
    assert ": start 2 on" not in job.log
    cluster.call("scontrol", "requeue", job.number)
    job.says(SAVED, start=3)
    cluster.call("scancel", job.number)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stall_is_requeued_a_requeue_by_hand_does_not_count_and_a_cancelled_job_stays_so(
    cluster: Cluster, directory: Path, data_flags: list[object]
) -> None:
    """The job is cancelled just after it has lost a process, before its script knows."""
    job, fail = _failing(cluster, directory, data_flags, "stall")
    job.reaches(Restarts="1")
    fail.unlink()
    assert (
        "crashed with code 124; a checkpoint was saved since the last start (crash 1 of at most 3): requeued" in job.log
    )
    job.set(max_train_steps=1_000_000, checkpointing_steps="no")
    job.says("step ", start=1)
    cluster.call("scontrol", "requeue", job.number)
    job.set(max_train_steps=1_000_000, checkpointing_steps=10)
    job.says(SAVED, start=2)
    assert "has no end" not in job.log
    cluster.rank(1).kill()
    cluster.call("scancel", job.number)
    job.reaches(JobState="CANCELLED")
    assert job.field("Restarts") == "2"
    assert job.log.count(": requeued") == 1
    assert "ended with code 1; Slurm itself ends or requeues the job" in job.log
