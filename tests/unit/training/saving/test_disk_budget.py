"""A run that has no room or no leave to write does not begin."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lora_dist_testing.disks import fill, small_disk
from lora_dist_testing.launching import flags
from lora_dist_testing.tiny import make_model

from lora_dist import train
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import load_base
from lora_dist.model.lora.trainable import make_trainable
from lora_dist.model.trained.bundle import write_model
from lora_dist.settings.train import LoraSettings, ModelSettings
from lora_dist.storage.disk import readable
from lora_dist.storage.writable import require_writable
from lora_dist.training.saving.disk_budget import Sizes, require_disk_space


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 100 kB."""
    with small_disk(tmp_path / "disk", "100k") as directory:
        yield directory


@pytest.mark.root
def test_too_little_room_is_said_before_training(
    vit: Path, photos: Path, disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        train.main(
            ["--model_name_or_path", str(vit), "--train_dir", str(photos / "train"), "--output_dir", str(disk / "run")]
        )
    assert end.value.code == 2
    assert "free, and this run writes" in capfd.readouterr().err
    assert not list(disk.iterdir())


@pytest.mark.root
def test_what_is_there_of_a_run_is_not_asked_for_again(disk: Path) -> None:
    sizes = Sizes(checkpoint=20_000, result=10_000, checkpoints=4)
    with pytest.raises(UserError, match=r"4 checkpoints of 30 kB and a result of 10 kB"):
        require_disk_space(disk / "run", Sizes(checkpoint=30_000, result=10_000, checkpoints=4))
    (disk / "run").mkdir()
    (disk / "run" / "checkpoint").write_bytes(bytes(60_000))
    require_disk_space(disk / "run", sizes)


@pytest.mark.root
def test_a_full_disk_is_named(disk: Path) -> None:
    fill(disk)
    with pytest.raises(UserError, match=r"--output_dir .*run: cannot write there \(No space left on device\)"):
        require_writable(disk / "run")


@pytest.mark.root
def test_a_disk_that_cannot_be_written_to_is_named(disk: Path) -> None:
    require_writable(disk / "not" / "there" / "yet")
    assert not list(disk.iterdir())
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(UserError, match=r"--output_dir .*run: cannot write there \(Read-only file system\)"):
        require_writable(disk / "run")


@pytest.mark.parametrize("tuning", ["lora", "head", "full"])
def test_sizes_are_those_of_the_tensors(tuning: str, tmp_path: Path) -> None:
    base = load_base(str(make_model(tmp_path / "vit")), ["a", "b"])
    model = make_trainable(base, ModelSettings(tuning=tuning), LoraSettings(lora_r=4))  # type: ignore[arg-type]
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    sizes = Sizes.of(model, tuning == "full", save_total_limit=2, has_average=False)
    assert sizes.checkpoint == 12 * sum(trained) + 4 * len(trained)
    assert sizes.checkpoints == 4
    assert sizes.result >= 4 * sum(trained)


def test_sizes_are_told_in_units_of_their_own() -> None:
    assert [readable(size) for size in (999, 1500, 2_400_000, 57_200_000_000)] == ["999 B", "2 kB", "2.4 MB", "57.2 GB"]


@pytest.fixture
def evaluation(vit: Path, photos: Path, tmp_path: Path) -> list[str]:
    """Arguments of an evaluation, but for its directory."""
    base = load_base(str(vit), ["a", "b", "c"])
    write_model(tmp_path / "model", base.model, base.processor, "")
    return [
        *flags(
            do_eval_only=True,
            adapter_name_or_path=str(tmp_path / "model"),
            validation_dir=str(photos / "validation"),
            mixed_precision="no",
        ),
        "--output_dir",
    ]


@pytest.mark.root
def test_an_evaluation_that_could_not_be_written_is_not_made(
    evaluation: list[str], disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(SystemExit) as end:
        train.main([*evaluation, str(disk / "run")])
    assert end.value.code == 2
    said = capfd.readouterr()
    assert "cannot write there (Read-only file system)" in said.err
    assert "eval_accuracy" not in said.out


@pytest.mark.root
def test_an_evaluation_that_cannot_be_written_is_printed(
    evaluation: list[str], disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(disk)
    # Room for the check at the start.
    os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 4096)
    with pytest.raises(SystemExit) as end:
        train.main([*evaluation, str(disk / "run")])
    assert end.value.code == 1
    said = capfd.readouterr()
    assert "evaluation.json: No space left on device" in said.err
    assert "eval_loss" in json.loads(said.out.splitlines()[-1])
