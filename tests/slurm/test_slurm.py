"""The scripts of slurm/ on a real cluster of two nodes."""

import csv
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from lora_dist_testing.cluster import SCRIPTS, START_UP, Cluster, log_of, user_environment
from lora_dist_testing.label_sets import make_label_sets
from lora_dist_testing.launching import ROOT, flags, lines_of, results_of, train
from lora_dist_testing.tiny import make_folder
from safetensors.torch import load_file

pytestmark = pytest.mark.root


@pytest.mark.timeout(900)
def test_a_job_on_two_nodes_goes_on_after_a_time_limit_and_preemption(
    cluster: Cluster, vit: Path, directory: Path, scratch: Path
) -> None:
    """Requeued at its time limit and again when preempted, one run of two nodes ends with the bits of a run left alone.

    The data is staged; a job that depends on this one waits for its real end.
    """
    photos = directory / "photos"
    make_folder(photos / "train", per_class=40, size=(400, 320))
    make_folder(photos / "validation", per_class=3, first=100)
    arguments: list[object] = [
        *flags(config=directory / "settings.yaml", model_name_or_path=vit, train_dir=photos / "train"),
        f"--validation_dir={photos / 'validation'}",
        *flags(
            lr_scheduler_type="constant",
            logging_steps=5,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            dataloader_num_workers=1,
            eval_steps="no",
            checkpointing_steps="no",
        ),
    ]
    whole, broken = directory / "whole", directory / "broken"
    # Without end until it has been interrupted, however fast this machine is.
    (directory / "settings.yaml").write_text("max_train_steps: 1000000\n")
    job = cluster.submit(
        "--nodes=2",
        "--time=10",
        "--signal=B:USR2@120",
        SCRIPTS / "train.sbatch",
        *arguments,
        "--output_dir",
        "broken",
        cwd=directory,
        **user_environment(PROJECT_DIR=str(ROOT), TMPDIR=str(scratch), STAGE_DIR=str(photos)),
    )
    after = cluster.submit(f"--dependency=afterok:{job}", "--wrap", "touch after", cwd=directory)

    def says(text: str, seconds: float) -> None:
        cluster.wait_for(
            lambda: text in log_of(job, directory), lambda: f"no {text!r} in\n{log_of(job, directory)}", seconds
        )

    def reaches(name: str, value: str, seconds: float) -> None:
        cluster.wait_for(lambda: cluster.field(job, name) == value, lambda: log_of(job, directory), seconds)

    # How long a start takes is not known beforehand, so the limit is moved to where the job is once it trains. Slurm
    # looks at limits twice a minute.
    says("step 10/", START_UP)
    hours, minutes, _ = map(int, cluster.field(job, "RunTime").split(":"))
    cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    reaches("Restarts", "1", 120)
    reaches("JobState", "PENDING", 60)
    assert cluster.field(after, "Reason") == "Dependency"
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")

    cluster.wait_for(
        lambda: "step " in log_of(job, directory).partition("start 1 ")[2], lambda: log_of(job, directory), START_UP
    )
    cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap", "true", cwd=directory)
    reaches("Restarts", "2", 90)
    done = max(int(path.name.removeprefix("step-")) for path in (broken / "checkpoints").iterdir())
    (directory / "settings.yaml").write_text(f"max_train_steps: {done + 20}\n")
    assert not (broken / "all_results.json").exists()
    reaches("JobState", "COMPLETED", START_UP + 60)
    cluster.wait_for(lambda: (directory / "after").exists(), "the dependent job", 30)

    log = log_of(job, directory)
    assert log.count("stopped and saved: requeued") == 2
    assert log.count("resuming from broken/checkpoints/step-") == 2
    assert log.count("SIGUSR2: saving and stopping") == log.count("SIGTERM: saving and stopping") == 1
    assert results_of(broken)["num_processes"] == 2
    for rank, node in enumerate(("n1", "n2")):
        text = (directory / "slurm_logs" / job / f"rank-{rank}.log").read_text(encoding="utf-8")
        assert [line for line in text.splitlines() if line.startswith("==")] == [
            line
            for start, code in enumerate((75, 75, 0))
            for line in (f"== job {job}, start {start}, rank {rank} on {node}", f"== exit code {code}")
        ]
    assert f"{done + 20} updates" in (directory / "slurm_logs" / job / "rank-0.log").read_text(encoding="utf-8")
    assert str(scratch) in (broken / "config.yaml").read_text(encoding="utf-8")
    assert list(scratch.glob("lora_dist-*")) == []

    train(*arguments, "--output_dir", whole, launch_file="ddp_cpu.yaml")
    expected = load_file(whole / "adapter" / "adapter_model.safetensors")
    adapter = load_file(broken / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter.items())
    losses = [[line["train/loss"] for line in lines_of(out) if "train/loss" in line] for out in (whole, broken)]
    assert losses[0] == losses[1]


def test_a_sweep_ends_in_one_table(cluster: Cluster, vit: Path, photos: Path, directory: Path) -> None:
    """Two runs that finish, and one that cannot: it fails, is not requeued, and leaves its row blank."""
    (directory / "my grid.txt").write_text(
        "# rate and rank\n--learning_rate 1e-3 --lora_r 4\n\n--learning_rate=5e-3 --lora_r '8'\n--learning_rate fast\n"
    )
    sweep = cluster.submit(
        "--array=1-3",
        "--time=10",
        SCRIPTS / "sweep.sbatch",
        "my grid.txt",
        "runs/my sweep",
        *flags(
            model_name_or_path=vit, train_dir=photos / "train", validation_dir=photos / "validation", max_train_steps=2
        ),
        cwd=directory,
        **user_environment(PROJECT_DIR=str(ROOT), LAUNCH_FILE=str(ROOT / "accelerate_configs" / "single.yaml")),
    )
    never = cluster.submit(f"--dependency=afterok:{sweep}", "--wrap", "touch never", cwd=directory)
    tasks = [f"{sweep}_{number}" for number in (1, 2, 3)]
    ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    cluster.wait_for(
        lambda: all(cluster.field(task, "JobState") in ends for task in tasks),
        lambda: "\n".join(log_of(task, directory) for task in tasks),
        START_UP,
    )
    assert [cluster.field(task, "JobState") for task in tasks] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert (cluster.field(tasks[2], "Restarts"), cluster.field(tasks[2], "ExitCode")) == ("0", "2:0")
    assert "ended with code 2, an error in settings, data or model: not requeued" in log_of(tasks[2], directory)
    assert "--learning_rate" in log_of(tasks[2], directory)
    cluster.wait_for(lambda: cluster.field(never, "Reason") == "DependencyNeverSatisfied", "the dependent job", 30)

    printed = subprocess.run(
        [sys.executable, SCRIPTS / "sweep_table.py", "my grid.txt", "runs/my sweep"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    with (directory / "runs" / "my sweep" / "table.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(row["run"], row["learning_rate"], row["lora_r"]) for row in table] == [
        ("1", "1e-3", "4"),
        ("2", "5e-3", "8"),
        ("3", "fast", ""),
    ]
    results = [results_of(directory / "runs" / "my sweep" / number) for number in ("1", "2")]
    assert [row["eval_accuracy"] for row in table] == [*(f"{each['eval_accuracy']:.4f}" for each in results), ""]
    assert results[0]["trainable_params"] < results[1]["trainable_params"]
    assert len(printed.splitlines()) == 5


def test_tensorboard_answers_where_the_job_says(cluster: Cluster, directory: Path) -> None:
    """Submitted from the checkout."""
    job = cluster.submit(
        "--time=10",
        f"--output={directory}/%x-%j.out",
        SCRIPTS / "tensorboard.sbatch",
        directory,
        cwd=ROOT,
        **user_environment(),
    )
    port = 10000 + int(job) % 20000

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as response:
                return b"TensorBoard" in response.read()
        except OSError:
            return False

    cluster.wait_for(answers, lambda: log_of(job, directory), START_UP)
    assert f"ssh -N -L {port}:localhost:{port} " in log_of(job, directory)
    cluster.call("scancel", job)


@pytest.mark.slow
def test_an_array_runs_the_folds_and_they_are_gathered(cluster: Cluster, vit: Path, directory: Path) -> None:
    """Of images with several labels, by patient, with columns of 0 and 1 whose names have spaces."""
    photos = Path(str(make_label_sets(directory / "data")["train_dir"]))
    images = sorted(photos.rglob("*.png"))
    rows = [[path.name, n % 2, n // 2 % 2, f"patient {n // 3}"] for n, path in enumerate(images)]
    with (directory / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "a cat", "it's a dog", "group"], *rows])
    array = cluster.submit(
        "--array=1-2",
        "--time=10",
        SCRIPTS / "folds.sbatch",
        "2",
        "runs/my folds",
        *flags(model_name_or_path=vit, train_dir=photos, labels_file="labels.csv", max_train_steps=2),
        *flags(problem_type="multi_label_classification", label_column_name="a cat,it's a dog"),
        cwd=directory,
        **user_environment(PROJECT_DIR=str(ROOT), LAUNCH_FILE=str(ROOT / "accelerate_configs" / "single.yaml")),
    )
    tasks = [f"{array}_{number}" for number in (1, 2)]
    cluster.wait_for(
        lambda: all(cluster.field(task, "JobState") in ("COMPLETED", "FAILED") for task in tasks),
        lambda: "\n".join(log_of(task, directory) for task in tasks),
        START_UP,
    )
    logs = "\n".join(log_of(task, directory) for task in tasks)
    assert [cluster.field(task, "JobState") for task in tasks] == ["COMPLETED", "COMPLETED"], logs
    folds = [Path("runs", "my folds", f"fold-{number}") for number in (1, 2)]
    command = [sys.executable, "-m", "lora_dist.folds", *map(str, folds)]
    printed = subprocess.run(command, cwd=directory, check=True, timeout=60, capture_output=True, text=True).stdout
    assert f"out of fold, {len(images)} images" in printed
    groups = [{json.loads(line)["group"] for line in _predictions(directory / fold)} for fold in folds]
    assert not groups[0] & groups[1]
    given = {
        json.loads(line)["path"]: json.loads(line)["given_labels"]
        for line in (directory / "runs" / "my folds" / "out_of_fold.jsonl").read_text(encoding="utf-8").splitlines()
    }
    names = ("a cat", "it's a dog")
    assert given == {
        str(path): [name for name, is_given in zip(names, row[1:], strict=False) if is_given == 1]
        for path, row in zip(images, rows, strict=True)
    }


def _predictions(run: Path) -> list[str]:
    return (run / "validation_predictions.jsonl").read_text(encoding="utf-8").splitlines()
