"""Real launches that are signalled, asked to save, and lose a process: all end together, saved where that can be."""

import signal
import time
from pathlib import Path

import psutil
import pytest
from lora_dist_testing.launching import Launch, assert_same_run, run_flags, saved_in, started, train
from lora_dist_testing.tiny import make_folder

RESUME = ("--resume_from_checkpoint", "auto")
TWO = ("--per_device_train_batch_size", 2)
ENDLESS = ("--max_train_steps", 100_000, "--eval_steps", "no", "--logging_steps", 1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough of them for updates and evaluations that a signal can fall into."""
    root = tmp_path_factory.mktemp("pictures")
    make_folder(root / "train", per_class=40)
    make_folder(root / "validation", per_class=150, first=100)
    return root


def _arguments(vit: Path, pictures: Path, out: Path, *more: object) -> list[object]:
    """Twenty updates of which four are an epoch, with two evaluations of a second or more."""
    return [
        *run_flags(
            vit,
            pictures,
            out,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=8,
            max_train_steps=20,
            learning_rate=5e-3,
            augmentation="randaugment",
            per_device_eval_batch_size=1,
            eval_steps=10,
            logging_steps=5,
            checkpointing_steps="no",
        ),
        *more,
    ]


def _until(launch: Launch, update: int) -> None:
    """Waits until the log of an update."""
    launch.wait_for(lambda: f"step {update}/" in launch.text)


def test_ctrl_c_stops_one_process_and_it_goes_on_to_the_same_bits(vit: Path, pictures: Path, tmp_path: Path) -> None:
    """Between two logs; and the workers of the loader get it too, as from a terminal, which signals the whole group.

    SIGTERM comes with it, as from a scheduler: PyTorch's workers would end on it.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ("--dataloader_num_workers", 1, "--per_device_eval_batch_size", 32)
    train(*_arguments(vit, pictures, whole, *more))
    with started(tmp_path / "log", *_arguments(vit, pictures, broken, *more)) as launch:
        _until(launch, 5)
        group = launch.processes()
        assert len(group) == 2
        for number in (signal.SIGINT, signal.SIGTERM):
            for one in group:
                one.send_signal(number)
        assert launch.wait() == 75
    saved = saved_in(broken)
    assert saved["logged_step"] < saved["step"] < 20
    # Whichever of two signals that are there at once is handled first.
    assert launch.text.count(": saving and stopping after this update") == 1
    assert f"stopped: after update {saved['step']} of 20, which is saved" in launch.text
    assert "Traceback" not in launch.text
    train(*_arguments(vit, pictures, broken, *more, *RESUME))
    assert_same_run(broken, whole)


def test_one_process_under_a_launcher_saves_on_demand_and_outlives_the_launcher(
    vit: Path, pictures: Path, tmp_path: Path
) -> None:
    """`accelerate launch` of a single process dies of SIGTERM at once and passes nothing on."""
    out = tmp_path / "run"
    with started(tmp_path / "log", *_arguments(vit, pictures, out, *ENDLESS), launch_file="single.yaml") as launch:
        _until(launch, 2)
        assert not (out / "checkpoints").exists()
        (out / "SAVE").touch()
        launch.wait_for(lambda: not (out / "SAVE").exists())
        first = saved_in(out)["step"]
        _until(launch, first + 2)
        launch.process.send_signal(signal.SIGTERM)
        assert launch.process.wait(10) == -signal.SIGTERM
        assert launch.wait() == -signal.SIGTERM
    last = saved_in(out)["step"]
    assert last >= first + 2
    assert f"stopped: after update {last} of" in launch.text


def _loads_torch(launch: Launch) -> bool:
    """Whether the training has come that far, in one look: a process that becomes another program is not seen for a
    moment.

    The launcher has loaded torch too, without the variables that it gives to the training.
    """
    try:
        trainings = [one for one in launch.processes() if "ACCELERATE_MIXED_PRECISION" in one.environ()]
        return any("libtorch" in file.path for one in trainings for file in one.memory_maps())
    except psutil.NoSuchProcess:
        return False


def test_a_launcher_that_dies_while_torch_is_loaded_leaves_nothing_behind(
    vit: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with started(tmp_path / "log", *_arguments(vit, pictures, out, *ENDLESS), launch_file="single.yaml") as launch:
        launch.wait_for(lambda: _loads_torch(launch))
        launch.process.send_signal(signal.SIGTERM)
        assert launch.wait(60) == -signal.SIGTERM
    assert not out.exists()


@pytest.fixture(scope="module")
def whole(vit: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two processes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(*_arguments(vit, pictures, out, *TWO), launch_file="ddp_cpu.yaml")
    return out


def test_two_processes_stop_together_wherever_the_signal_arrives_and_go_on_to_the_same_bits(
    whole: Path, vit: Path, pictures: Path, tmp_path: Path
) -> None:
    """First at one rank alone and in an evaluation, which is made when the run goes on; then at the launcher."""
    out = tmp_path / "run"
    arguments = _arguments(vit, pictures, out, *TWO)
    with started(tmp_path / "first", *arguments, launch_file="ddp_cpu.yaml") as launch:
        _until(launch, 5)
        second = launch.rank(1)
        _until(launch, 10)
        time.sleep(0.1)
        second.send_signal(signal.SIGUSR2)
        assert launch.wait() == 1
    saved = saved_in(out)
    assert (saved["step"], saved["last_evaluated_step"]) == (10, 9)
    assert "stopped: after update 10 of 20" in launch.text
    assert launch.text.count("exitcode  : 75") == 2
    assert "Traceback" not in launch.text.partition("stopped:")[0]

    with started(tmp_path / "second", *arguments, *RESUME, launch_file="ddp_cpu.yaml") as launch:
        launch.wait_for(lambda: "eval at step 10" in launch.text)
        launch.process.send_signal(signal.SIGTERM)
        assert launch.wait() == 1
    assert 10 < saved_in(out)["step"] < 20
    assert f"stopped: after update {saved_in(out)['step']} of 20" in launch.text

    train(*arguments, *RESUME, launch_file="ddp_cpu.yaml")
    assert_same_run(out, whole)


def test_a_second_signal_ends_a_process_that_waits_for_another_for_ever(
    vit: Path, pictures: Path, tmp_path: Path
) -> None:
    """Its main thread is in a collective and runs no Python."""
    arguments = _arguments(vit, pictures, tmp_path / "run", *TWO, *ENDLESS)
    with started(tmp_path / "log", *arguments, launch_file="ddp_cpu.yaml") as launch:
        _until(launch, 2)
        first, second = launch.rank(0), launch.rank(1)
        second.suspend()
        time.sleep(0.5)
        first.send_signal(signal.SIGTERM)
        launch.wait_for(lambda: "SIGTERM: saving and stopping after this update" in launch.text)
        time.sleep(3.5)
        assert "exiting without saving" not in launch.text.splitlines()[-1]
        first.send_signal(signal.SIGTERM)
        launch.wait_for(lambda: "second signal (SIGTERM): exiting without saving" in launch.text, seconds=5)
        second.kill()
        assert launch.wait() == 1
    assert f"exitcode  : {128 + signal.SIGTERM} (pid: {first.pid})" in launch.text
    assert not (tmp_path / "run" / "checkpoints").exists()


FAILING = """
import os
from pathlib import Path

if os.environ.get("RANK") == "1":
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    # Read here, because accelerate empties the environment for moments.
    file = Path(os.environ["FAIL"])

    def fail(*_):
        if file.exists():
            raise ZeroDivisionError

    register_optimizer_step_pre_hook(fail)
"""


def test_the_first_traceback_is_that_of_the_rank_that_failed(vit: Path, pictures: Path, tmp_path: Path) -> None:
    """Those of the others only tell that it is gone."""
    (tmp_path / "sitecustomize.py").write_text(FAILING, encoding="utf-8")
    arguments = _arguments(vit, pictures, tmp_path / "run", *TWO, *ENDLESS)
    extra = {"PYTHONPATH": str(tmp_path), "FAIL": str(tmp_path / "fail")}
    with started(tmp_path / "log", *arguments, launch_file="ddp_cpu.yaml", **extra) as launch:
        _until(launch, 2)
        (tmp_path / "fail").touch()
        assert launch.wait() == 1
    first = launch.text.split("Traceback (most recent call last)")[1]
    assert "ZeroDivisionError" in first
    assert "lora_dist/training/step.py" in first
