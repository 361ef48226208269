"""Benchmarks: measurements, diagnosis, comparison and the CSV file."""

import dataclasses
import re
import time
from pathlib import Path

import pytest
import torch
from lora_dist_testing.launching import flags
from lora_dist_testing.tiny import make_folder

from lora_dist.bench.compare import Comparison, Throughput
from lora_dist.bench.diagnosis import Hardware, diagnose
from lora_dist.bench.measure import Measurements, assemble_unwritten, count_flops, measure, warmup_updates
from lora_dist.bench.report import row
from lora_dist.bench.results import COLUMNS, append_row, require_appendable, table
from lora_dist.bench.trainer_baseline import time_baseline
from lora_dist.data.batch import Batch, TrainImages
from lora_dist.data.loader import batches, train_loader
from lora_dist.data.sampling.order import Sample
from lora_dist.errors import UserError
from lora_dist.processes.runtime import launch
from lora_dist.settings import cli
from lora_dist.settings.bench import BenchSettings, contradictions
from lora_dist.settings.train import Settings
from lora_dist.training.run import TrainingRun

ROOT = Path(__file__).parents[3]
MEASURED = Measurements(100.0, 110.0, 900.0, 0.01, 50.0, 100.0, 300.0, 1.2, 0.05, 1000.0, 0.1, 8.0)
SLOW_LOADER = {"data_wait": 0.3, "loader_images_per_second": 120.0}
CPU = Hardware("cpu", "no", 1, workers=0, idle_cores=3)
GPU = Hardware("cuda", "no", 1, workers=15, idle_cores=0)


def parse(*argv: object) -> BenchSettings:
    words = [str(word) for word in argv]
    return cli.parse(BenchSettings, words, prog="bench", description="", contradictions=contradictions)


@pytest.fixture(scope="module")
def made(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingRun, Path]:
    """A run of two micro-batches of 4 an update, ready to be measured, and the directory it may write to."""
    root = tmp_path_factory.mktemp("bench")
    make_folder(root / "photos", per_class=12)
    settings = parse(
        *flags(
            model_name_or_path=vit,
            train_dir=root / "photos",
            output_dir=root / "run",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            lora_dropout=0,
        ),
    )
    return assemble_unwritten(settings, launch("no"), root / "written"), root


class Slow(TrainImages):
    """Images of which a micro-batch takes half a second."""

    def prepared(self, samples: list[Sample]) -> Batch:
        time.sleep(0.5)
        return super().prepared(samples)


def test_all_of_a_run_is_measured_and_nothing_is_written_where_it_would_be(made: tuple[TrainingRun, Path]) -> None:
    """What is measured depends on the machine; that a slow loader is waited for does not."""
    run, root = made
    images = Slow(run.images.split, run.images.transforms, run.settings.augmentation, seed=0)
    measured = measure(dataclasses.replace(run, images=images), updates=1)
    samples = 8
    assert samples / measured.loader_images_per_second >= 1
    assert samples / measured.images_per_second * measured.data_wait >= 1
    assert measured.step_images_per_second > measured.images_per_second
    assert 0 < measured.mfu < 1
    assert measured.forward_images_per_second
    assert measured.lora_costs
    assert measured.peak_memory_mb > 100
    (saved,) = (root / "written" / "checkpoints").iterdir()
    assert measured.checkpoint_mb * 1e6 == sum(file.stat().st_size for file in saved.iterdir())
    assert not (root / "run").exists()
    found = row(run, measured, None, load=1.5)
    assert found.keys() <= set(COLUMNS)
    assert (found["engine"], found["precision"], found["batch"], found["accumulation"]) == ("single", "no", 4, 2)
    assert found["torch"] == torch.__version__.partition("+")[0]


def test_the_flops_of_an_update_are_those_of_its_matrix_products(made: tuple[TrainingRun, Path]) -> None:
    """Of two micro-batches of 4 images; the backward pass has one product for each of the forward pass, and for each
    of LoRA's a second one, but ends in the first layer."""
    run, _ = made
    device = torch.device("cpu")
    held = list(batches(train_loader(run.images, run.plan, 0, 1, run.settings.data, device)))
    assert len(held) == 2
    tokens, width, inner, rank, layers = 17, 32, 64, 16, 2
    base = layers * (4 * width * width + 2 * width * inner + 2 * tokens * width) + 3 * 8 * 8 * width
    lora = layers * 2 * 2 * width * rank
    forward = 2 * 8 * tokens * (base + lora)
    assert 1.6 * forward < count_flops(run, held) < 2 * forward + 2 * 8 * tokens * lora


def test_warmup_updates_cover_each_worker_once() -> None:
    assert [warmup_updates(workers, 4) for workers in (0, 1, 4, 5)] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("changes", "more", "found", "expected"),
    [
        (SLOW_LOADER, (), CPU, "data loader .30% .*; --cache_dir or --dataloader_num_workers 3 "),
        (SLOW_LOADER, (), GPU, "data loader .*; --cache_dir or --augment_on_device may help"),
        (SLOW_LOADER, ("--cache_dir", "c", "--augment_on_device"), GPU, "data loader .* no core is idle"),
        ({"data_wait": 0.3}, (), CPU, "Bottleneck: the step"),
        (
            {"exchange": 0.4},
            (),
            CPU._replace(processes=2),
            "communication .40% .* --per_device_train_batch_size .* or a",
        ),
        ({"exchange": 0.4}, (), CPU, "the step .it reaches 50% .*; no setting"),
        ({"gflops_per_second": 20.0}, (), GPU, "the step .* 20% .*; .* bf16 or --torch_compile or a "),
        ({"gflops_per_second": 20.0}, ("--gradient_checkpointing",), GPU, "--mixed_precision bf16 or no --gradient_"),
        ({"gflops_per_second": 80.0}, (), CPU, "computation .it reaches 80% .*; no setting"),
        ({"gflops_per_second": 80.0}, (), GPU, "computation .*; --mixed_precision bf16 may help"),
    ],
)
def test_the_diagnosis_names_the_bottleneck_and_settings_that_may_help(
    changes: dict[str, float], more: tuple[str, ...], found: Hardware, expected: str, tmp_path: Path
) -> None:
    settings = parse("--train_dir", tmp_path, *more)
    said = diagnose(Measurements(**{**vars(MEASURED), **changes}), settings, found)
    assert re.search(expected, said), said
    assert said.count(".") == 1 + said.count("%.")
    names = [word.strip(";,().") for word in said.split() if word.startswith("--")]
    assert {name.removeprefix("--") for name in names} <= cli.flat_fields(Settings).keys()


def test_ratios_of_a_comparison_are_within_a_round() -> None:
    rounds = [
        (Throughput(30, 90), Throughput(20, 100)),
        (Throughput(60, 91), Throughput(30, 100)),
        (Throughput(30, 95), Throughput(30, 100)),
    ]
    found = Comparison.of(rounds)
    assert (found.our_images_per_second, found.trainer_images_per_second) == (30, 30)
    assert (found.our_memory_mb, found.trainer_memory_mb) == (91, 100)
    assert found._fields == COLUMNS[-len(found) :]
    assert (found.faster_than_trainer, found.lowest, found.highest, found.memory_of_trainer, found.rounds) == (
        1.5,
        1.0,
        2.0,
        0.91,
        3,
    )


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (("--dry_run",), "dry_run"),
        (("--compare", "trainer", "--tuning", "full"), "tuning"),
        (("--compare", "trainer", "--auto_batch_size"), "auto_batch_size"),
        (("--compare", "trainer", "--augmentation", "randaugment"), "augmentation"),
        (("--compare", "trainer", "--mixup_alpha", "0.2"), "mixup_alpha"),
        (("--compare", "trainer", "--use_dora"), "use_dora"),
        (("--compare", "mine"), "compare"),
    ],
)
def test_what_cannot_be_measured_or_compared_is_said_first(more: tuple[str, ...], name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--{name}"):
        parse("--train_dir", tmp_path, *more)


def test_the_baseline_trains_any_architecture_for_as_many_updates(architecture: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", per_class=12)
    settings = parse(
        *flags(
            model_name_or_path=architecture,
            train_dir=tmp_path / "photos",
            augmentation="none",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            updates=2,
        ),
    )
    samples, seconds, device = time_baseline(settings, tmp_path / "written")
    assert (samples, device.type) == (16, "cpu")
    assert seconds > 0


def test_rows_are_added_and_the_newest_of_a_kind_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "bench.csv"
    require_appendable(file)
    assert not file.exists()
    one = dict.fromkeys(COLUMNS) | {"model": "vit", "precision": "no", "batch": 32, "accumulation": 4, "engine": "ddp"}
    one |= {"images_per_second": 20.123456, "mfu": 0.456, "peak_memory_mb": 1234.5, "lora_costs": 1.0512}
    append_row(file, one)
    require_appendable(file)
    append_row(file, one | {"images_per_second": 30.0})
    append_row(file, one | {"model": "swin", "faster_than_trainer": 1.5, "lowest": 1.4, "highest": 1.6})
    lines = table(file).splitlines()[2:]
    assert len(file.read_text(encoding="utf-8").splitlines()) == 4
    assert len(lines) == 2
    assert "| vit, 32 x 4, ddp, fp32 | 30 |" in lines[0]
    assert "46% | 1.051x | 1,234 MiB |  |" in lines[0]
    assert "1.5x (1.4 to 1.6)" in lines[1]


def test_a_file_that_cannot_take_a_row_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(UserError, match="other columns"):
        require_appendable(tmp_path / "other.csv")
    with pytest.raises(UserError, match="--csv"):
        require_appendable(tmp_path / "nowhere" / "bench.csv")
    assert (tmp_path / "other.csv").read_text(encoding="utf-8") == "a,b\n1,2\n"


def test_the_documentation_shows_the_rows_of_the_results_file() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    assert table(ROOT / "tests" / "benchmarks" / "results" / "bench.csv") in page
