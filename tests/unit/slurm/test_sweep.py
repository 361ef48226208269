"""A line of a grid becomes the flags of a run, or the job ends: without Slurm, and with a script in place of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lora_dist_testing.launching import flags

SWEEP = Path(__file__).parents[3] / "slurm" / "sweep.sbatch"


def _task(directory: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Runs the task of a grid's line; the training would get each word that is printed."""
    (directory / "slurm").mkdir()
    (directory / "slurm" / "train.sbatch").write_text("printf '<%s>\\n' \"$@\"\n", encoding="utf-8")
    (directory / "grid.txt").write_text(f"# flags\n\n{line}\n", encoding="utf-8")
    return subprocess.run(
        ["bash", SWEEP, directory / "grid.txt", "runs", "--config", "demo"],
        env={"PATH": "/usr/bin:/bin", "PROJECT_DIR": str(directory), "SLURM_ARRAY_TASK_ID": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_line_is_split_as_a_shell_does(tmp_path: Path) -> None:
    result = _task(tmp_path, """--train_dir 'my photos' --lora_r 8 --hub_model_id "" """)
    words = flags(config="demo", train_dir="my photos", lora_r="8", hub_model_id="")
    assert result.stdout.splitlines() == [f"<{word}>" for word in [*words, "--output_dir", "runs/1"]]
    assert result.returncode == 0


@pytest.mark.parametrize("line", ["--lora_r 8 --train_dir 'my photos", '--train_dir "my photos --lora_r 8'])
def test_a_quote_that_is_not_closed_ends_the_job(line: str, tmp_path: Path) -> None:
    """It would train with the flags before the quote alone."""
    result = _task(tmp_path, line)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{tmp_path / 'grid.txt'}, line 1: a quote is not closed: {line}" in result.stderr


@pytest.mark.parametrize(("task", "code"), [("3", 0), ("6", 2)])
def test_a_task_trains_its_fold(task: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "train.sbatch").write_text("printf '<%s>\\n' \"$@\"\n", encoding="utf-8")
    result = subprocess.run(
        ["bash", SWEEP.with_name("folds.sbatch"), "5", "runs/x", "--train_dir", "my photos"],
        env={"PATH": "/usr/bin:/bin", "PROJECT_DIR": str(tmp_path), "SLURM_ARRAY_TASK_ID": task},
        capture_output=True,
        text=True,
        check=False,
    )
    words = flags(train_dir="my photos", fold="3/5", output_dir="runs/x/fold-3")
    assert result.stdout.splitlines() == ([] if code else [f"<{word}>" for word in words])
    assert result.returncode == code


@pytest.mark.parametrize("metric", ["accuracy", "mAP"])
def test_the_table_has_the_metric_of_the_problem_type(metric: str, tmp_path: Path) -> None:
    (tmp_path / "grid.txt").write_text("--lora_r 8\n--lora_r 16\n", encoding="utf-8")
    (tmp_path / "2").mkdir()
    results = {f"eval_{metric}": 0.5, "eval_macro_f1": 0.25, "eval_loss": None, "best_step": 3, "train_runtime": 1.0}
    (tmp_path / "2" / "all_results.json").write_text(json.dumps(results), encoding="utf-8")
    command = [sys.executable, SWEEP.with_name("sweep_table.py"), tmp_path / "grid.txt", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "table.csv").read_text(encoding="utf-8").splitlines() == [
        f"run,lora_r,eval_{metric},eval_macro_f1,eval_loss,best_step,train_runtime",
        "1,8,,,,,",
        "2,16,0.5000,0.2500,,3,1.0000",
    ]
