"""A run of two processes that is killed again and again ends with the weights of one that never was.

`STRESS=1` (`make stress`) makes it fifty times; what happened is appended to the file that `STRESS_RECORD` names.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
from lora_dist_testing.launching import Launch, assert_same_run, flags, saved_in, started, train
from lora_dist_testing.tiny import make_folder, make_model

KILLS = 50 if os.environ.get("STRESS") else 2
UPDATES_A_KILL = 15
SEED = int(os.environ.get("STRESS_SEED", "0"))


def _moments(run: Path, chance: random.Random) -> dict[str, Callable[[], bool]]:
    """When to strike: after some time, or while a checkpoint is written, renamed or removed."""
    checkpoints = run / "checkpoints"
    newest = saved_in(run)["step"] if list(checkpoints.glob("step-*")) else 0
    later = newest + chance.randrange(2, UPDATES_A_KILL)

    def seen(pattern: str) -> bool:
        try:
            return any(path.name.startswith(pattern) for path in checkpoints.iterdir())
        except FileNotFoundError:
            return False

    def has_saved(step: int) -> bool:
        return (checkpoints / f"step-{step:08d}").exists()

    return {
        "at some moment": lambda: has_saved(later) and chance.random() < 0.02,
        "while a checkpoint is written": lambda: has_saved(newest + 1) and seen(".writing-"),
        "while a checkpoint is removed": lambda: has_saved(newest + 1) and seen(".removing-"),
        "right after a rename": lambda: has_saved(later),
        "before the first update": lambda: time.monotonic() > begun + chance.uniform(2, 8),
    }


begun = 0.0


def _strike(launch: Launch, chance: random.Random) -> str:
    """Kills one rank, both at once, or the launcher."""
    whom = chance.choice(["rank 0", "rank 1", "all", "the launcher"])
    if whom == "the launcher":
        launch.process.kill()
    elif whom == "all":
        for one in launch.processes():
            _kill(one)
    else:
        try:
            _kill(launch.rank(int(whom[-1])))
        except StopIteration:
            launch.process.kill()  # it has not started its processes yet
            return "the launcher"
    return whom


def _kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_weights(tmp_path: Path) -> None:
    global begun
    chance = random.Random(SEED)
    vit = make_model(tmp_path / "vit", num_labels=3)
    make_folder(tmp_path / "photos", per_class=6)
    make_folder(tmp_path / "validation", per_class=6, first=100)
    arguments = flags(
        model_name_or_path=vit,
        train_dir=tmp_path / "photos",
        validation_dir=tmp_path / "validation",
        per_device_train_batch_size=3,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        logging_steps=1,
        checkpointing_steps=1,
        eval_steps=20,
        metric_for_best_model="loss",
        learning_rate=1e-4,
        max_train_steps=(KILLS + 1) * UPDATES_A_KILL,
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(*arguments, "--output_dir", whole, launch_file="ddp_cpu.yaml")
    struck: Counter[str] = Counter()
    names = list(_moments(broken, chance))
    for number in range(KILLS):
        # While a checkpoint is written and while one is removed come first.
        when = names[(number + 1) % len(names)]
        begun = time.monotonic()
        moment = _moments(broken, chance)[when]
        more = ("--output_dir", broken, "--resume_from_checkpoint", "auto")
        with started(tmp_path / f"log-{number}", *arguments, *more, launch_file="ddp_cpu.yaml") as launch:
            while not moment() and launch.process.poll() is None:
                assert time.monotonic() < begun + 120, launch.text
            whom = _strike(launch, chance)
            launch.wait(60)
        struck[f"{when}: {whom}"] += 1
        assert launch.process.returncode != 0, "it ended before it was struck: make it longer"
    result = train(*arguments, "--output_dir", broken, "--resume_from_checkpoint", "auto", launch_file="ddp_cpu.yaml")
    assert "Traceback" not in result.stderr
    assert_same_run(broken, whole)
    assert not list((broken / "checkpoints").glob(".*"))
    record = os.environ.get("STRESS_RECORD")
    if record:
        lines = [f"{count:3} x {what}" for what, count in sorted(struck.items())]
        with Path(record).open("a", encoding="utf-8") as file:
            file.write("\n".join([f"killed {KILLS} times (seed {SEED}), same adapter and curves:", *lines]) + "\n")
