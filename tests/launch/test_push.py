"""The commands and a Hub on this machine: two processes push, both commands pull, a Hub that dies costs no result."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lora_dist_testing.hub_server import SIGNATURE, TOKEN, Hub, environment_of, serving
from lora_dist_testing.launching import flags, predict, results_of, run_flags, started, train
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader


def _arguments(vit: Path, photos: Path, out: Path, *more: object) -> list[object]:
    return [
        *run_flags(vit, photos, out, per_device_train_batch_size=4, num_train_epochs=2, learning_rate=5e-3),
        *more,
    ]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub whose first commits fail."""
    with serving() as running:
        running.fail("commit", 503, "drop")
        yield running


@pytest.fixture(scope="module")
def pushed(hub: Hub, vit: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that pushes to `lab/flowers`; what it said is in `said`, beside it."""
    root = tmp_path_factory.mktemp("pushed")
    arguments = _arguments(vit, photos, root / "run", "--push_to_hub", "--hub_model_id", "lab/flowers")
    result = train(*arguments, launch_file="ddp_cpu.yaml", **environment_of(hub, root / "home"))
    (root / "said").write_text(result.stdout + result.stderr)
    return root / "run"


def test_two_processes_push_what_they_hand_over(hub: Hub, pushed: Path) -> None:
    assert results_of(pushed)["num_processes"] == 2
    repository = hub.repositories["lab/flowers"]
    assert repository.files == {file.name: file.read_bytes() for file in (pushed / "adapter").iterdir()}
    assert hub.messages("lab/flowers")[-1].startswith(f"Step {results_of(pushed)['best_step']}: accuracy ")
    assert hub.requests.count("commit") >= 3
    assert "pushed to lab/flowers on the Hub: Step" in (pushed.parent / "said").read_text()
    assert not (pushed / "outbox").exists()


def test_no_secret_is_in_any_file_or_log(hub: Hub, pushed: Path) -> None:
    files = [file for file in pushed.rglob("*") if file.is_file()]
    assert {"config.yaml", "all_results.json", "metrics.jsonl", "README.md"} <= {file.name for file in files}
    contents = [file.read_bytes() for file in [*files, pushed.parent / "said"]]
    boards = [file for file in files if "tfevents" in file.name]
    assert boards
    contents += [event for board in boards for event in RawEventFileLoader(str(board)).Load()]
    contents += [content for commit in hub.repositories["lab/flowers"].commits for content in commit.files.values()]
    contents += [message.encode() for message in hub.messages("lab/flowers")]
    for secret in (TOKEN, SIGNATURE, TOKEN[3:20]):
        assert not [content for content in contents if secret.encode() in content]


def test_prediction_and_evaluation_pull_it_back(hub: Hub, pushed: Path, photos: Path, tmp_path: Path) -> None:
    environment = environment_of(hub, tmp_path / "home")
    images = photos / "validation"
    there = predict("--adapter", "lab/flowers", "--images", images, **environment)
    here = predict("--adapter", pushed / "adapter", "--images", images)
    assert there.stdout == here.stdout
    assert len(there.stdout.splitlines()) == 9
    result = train(
        *flags(
            do_eval_only=True, adapter_name_or_path="lab/flowers", validation_dir=images, output_dir=tmp_path / "eval"
        ),
        launch_file="ddp_cpu.yaml",
        **environment,
    )
    metrics = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
    assert metrics["eval_accuracy"] == pytest.approx(results_of(pushed)["eval_accuracy"])
    missing = predict("--adapter", "lab/roses", "--images", images, code=2, **environment)
    assert "no repository lab/roses" in missing.stderr
    assert "Traceback" not in missing.stderr
    assert TOKEN not in missing.stderr


def test_a_hub_that_dies_costs_no_result(vit: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with serving() as dying:
        environment = environment_of(dying, tmp_path / "home")
        with started(tmp_path / "log", *_arguments(vit, photos, out, "--push_to_hub"), **environment) as launch:
            launch.wait_for(lambda: "create" in dying.requests)
            dying.stop()
            assert launch.wait() == 0
            said = launch.text
    assert results_of(out)["eval_accuracy"] > 0
    assert f"{out / 'adapter'} is complete, but could not be pushed to the Hub" in said
    assert f"hf upload ada/run {out / 'adapter'} ." in said
    assert "Traceback" not in said
    assert TOKEN not in said
    assert len(predict("--adapter", out / "adapter", "--images", photos / "validation").stdout.splitlines()) == 9
