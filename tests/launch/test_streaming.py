"""Training from streamed shards through real launchers: the same on two processes, after a kill, and to the end."""

import json
from pathlib import Path

import pytest
import torch
from lora_dist_testing.launching import RESULTS, flags, lines_of, results_of, started, train
from lora_dist_testing.tiny import make_png, make_shards, write_tar
from safetensors.torch import load_file

UNEVEN = (13, 2, 9, 1, 7)
BATCH = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--num_train_epochs", 3)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("parquet"), UNEVEN, rows_in_group=5)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("tars"), UNEVEN, tar=True)


def _arguments(vit: Path, data: Path, out: Path, *more: object) -> list[object]:
    return [
        *flags(
            model_name_or_path=vit,
            dataset_name=data,
            streaming=True,
            validation_split="validation",
            shuffle_buffer_size=16,
            output_dir=out,
            logging_steps=1,
            lora_dropout=0,
        ),
        *more,
    ]


def _losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in lines_of(out) if "train/loss" in line]


def _adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def single(vit: Path, parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single") / "run"
    train(*_arguments(vit, parquet, out, *BATCH))
    return out


def test_a_streamed_run_leaves_what_any_run_does(single: Path) -> None:
    assert {path.name for path in single.iterdir()} == RESULTS | {"checkpoints", "tensorboard"}
    results = results_of(single)
    assert (results["step"], results["epoch"], results["train_samples"]) == (12, 3, 32)
    assert results["eval_samples"] == 9
    split = json.loads((single / "split.json").read_text())
    assert list(split["train"]["files"].values()) == list(UNEVEN)
    assert results["data_fingerprint"]["train"] == split["train"]["fingerprint"]


def test_two_processes_and_workers_train_as_one_does(single: Path, vit: Path, parquet: Path, tmp_path: Path) -> None:
    """Uneven shares, and lanes that run out on one process before the other, included."""
    batch = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--num_train_epochs", 3)
    more = ("--dataloader_num_workers", 2)
    train(*_arguments(vit, parquet, tmp_path / "run", *batch, *more), launch_file="ddp_cpu.yaml")
    assert results_of(tmp_path / "run")["num_processes"] == 2
    found, expected = _losses(tmp_path / "run"), _losses(single)
    assert len(found) == 12
    for (step, loss), (expected_step, expected_loss) in zip(found, expected, strict=True):
        assert (step, loss) == (expected_step, pytest.approx(expected_loss, abs=1e-5))
    for name, tensor in _adapter(tmp_path / "run").items():
        torch.testing.assert_close(tensor, _adapter(single)[name], rtol=1e-4, atol=1e-5)


def test_a_killed_run_goes_on_to_the_same_bits(vit: Path, tars: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch and of tar files; it goes on with workers, as it began without."""
    more = (*BATCH, "--lora_dropout", 0.1, "--augmentation", "randaugment", "--mixup_alpha", 0.4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(*_arguments(vit, tars, whole, *more, "--checkpointing_steps", 2))
    with started(tmp_path / "log", *_arguments(vit, tars, broken, *more, "--checkpointing_steps", 2)) as launch:
        launch.wait_for(lambda: sorted((broken / "checkpoints").glob("step-*")))
        launch.process.kill()
        launch.wait()
    assert not (broken / "all_results.json").exists()
    again = (*more, "--checkpointing_steps", 2, "--resume_from_checkpoint", "auto", "--dataloader_num_workers", 2)
    resumed = train(*_arguments(vit, tars, broken, *again))
    assert "resuming from" in resumed.stderr
    expected = _adapter(whole)
    for name, tensor in _adapter(broken).items():
        assert torch.equal(tensor, expected[name]), name
    assert _losses(broken) == _losses(whole)


def test_very_uneven_shards_end_on_two_processes(vit: Path, tmp_path: Path) -> None:
    """One process has nearly all samples; it waits for nobody, and nobody for it, as all make the same batches."""
    data = make_shards(tmp_path / "data", (41, 1, 2), validation=3, tar=True)
    batch = ("--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 1, "--num_train_epochs", 2)
    train(*_arguments(vit, data, tmp_path / "run", *batch), launch_file="ddp_cpu.yaml")
    results = results_of(tmp_path / "run")
    assert (results["epoch"], results["step"], results["train_samples"]) == (2, 16, 44)


def test_a_bad_image_is_named_by_shard_and_row(vit: Path, tmp_path: Path) -> None:
    data = make_shards(tmp_path / "data", UNEVEN, tar=True)
    samples = [(make_png(0, number)[: 60 if number == 3 else None], number % 3) for number in range(9)]
    write_tar(data / "train-00002-of-00005.tar", samples)
    more = (*BATCH, "--dataloader_num_workers", 2)
    result = train(*_arguments(vit, data, tmp_path / "run", *more), launch_file="ddp_cpu.yaml", code=None)
    assert "cannot read an image of the data set: train-00002-of-00005.tar row 3 (" in result.stderr


def test_mistakes_are_told_before_anything_is_loaded(vit: Path, parquet: Path, single: Path, tmp_path: Path) -> None:
    lanes = train(*_arguments(vit, parquet, tmp_path, "--streaming_lanes", 1), launch_file="ddp_cpu.yaml", code=None)
    assert "9 shards (row groups or tar files) in 1 lanes cannot be shared by 2 processes" in lanes.stderr
    other = (*BATCH, "--resume_from_checkpoint", "auto", "--streaming_lanes", 4)
    result = train(*_arguments(vit, parquet, single, *other), code=2)
    assert "order was 8 lanes shuffled in blocks of 2 and is now 4 lanes shuffled in blocks of 4" in result.stderr
