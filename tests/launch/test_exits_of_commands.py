"""Prediction, serving, audits, the image cache and benchmarks leave nothing behind, whatever way they end."""

import os
import signal
import time
from pathlib import Path

import pytest
from lora_dist_testing.edits import edit_json
from lora_dist_testing.launching import started
from lora_dist_testing.tiny import make_model
from PIL import Image

SECONDS = 10


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier whose classes have names."""
    model = make_model(tmp_path_factory.mktemp("named") / "vit")
    edit_json(model / "config.json", id2label={"0": "a", "1": "b"})
    return model


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images that take long to decode."""
    root = tmp_path_factory.mktemp("large")
    Image.new("L", (6000, 6000)).save(root / "one.png")
    for name in ("a", "b"):
        (root / "photos" / name).mkdir(parents=True)
        for number in range(200):
            (root / "photos" / name / f"{number}.png").symlink_to(root / "one.png")
    return root / "photos"


def _words(command: str, named: Path, large: Path, out: Path) -> list[object]:
    train = ("--model_name_or_path", named, "--train_dir", large)
    return {
        "predict": ["lora_dist.predict", "--model", named, "--images", large, "--num_workers", 2],
        "audit": ["lora_dist.audit", "--train_dir", large, "--num_workers", 2, "--output_dir", out],
        "cache": ["lora_dist.train", *train, "--output_dir", out / "run", "--cache_dir", out / "cache"],
        "bench": ["lora_dist.bench", *train, "--compare", "trainer", "--updates", 50, "--rounds", 3],
        "serve": ["lora_dist.predict", "--model", named, "--serve", "--port", 0],
    }[command]


SIGNALLED = {signal.SIGINT: (130, 0), signal.SIGTERM: (-signal.SIGTERM, 0), signal.SIGKILL: (-signal.SIGKILL,)}
IN_CI = {("predict", signal.SIGKILL), ("cache", signal.SIGINT), ("audit", signal.SIGTERM)}


@pytest.mark.parametrize(
    ("command", "number"),
    [
        pytest.param(command, number, marks=[] if (command, number) in IN_CI else pytest.mark.slow)
        for command in ("predict", "audit", "cache", "bench", "serve")
        for number in SIGNALLED
    ],
)
def test_a_signal_ends_a_command_with_all_that_it_started(
    command: str, number: signal.Signals, named: Path, large: Path, tmp_path: Path
) -> None:
    """To the whole group, as a terminal does it, and SIGKILL to the command alone."""
    module, *words = _words(command, named, large, tmp_path)
    with started(tmp_path / "log", *words, module=str(module)) as run:
        if command == "serve":
            run.wait_for(lambda: "serving on" in run.text)
        else:
            run.wait_for(lambda: len(run.workers()) >= (1 if command == "bench" else 2))
            time.sleep(2)
        if number == signal.SIGKILL:
            run.process.kill()
        else:
            os.killpg(run.process.pid, number)
        assert run.wait(SECONDS) in SIGNALLED[number]
    assert "Traceback" not in run.text


@pytest.mark.parametrize("command", ["predict", pytest.param("cache", marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_ends_a_command_with_a_sentence(
    command: str, named: Path, large: Path, tmp_path: Path
) -> None:
    module, *words = _words(command, named, large, tmp_path)
    with started(tmp_path / "log", *words, module=str(module)) as run:
        run.wait_for(lambda: len(run.workers()) >= 2)
        time.sleep(2)
        run.workers()[0].kill()
        run.wait_for(lambda: "error: " in run.text)
        assert run.wait(SECONDS) == 1
    assert "error: a DataLoader worker was killed by SIGKILL" in run.text
    assert "Traceback" not in run.text
