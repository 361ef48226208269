"""The packaged demo: what its names stand for, and data that is written whole, once, and the same everywhere."""

import gzip
import multiprocessing
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image
from sklearn.datasets import load_digits

from lora_dist import demo
from lora_dist.data.sources.load import load_data
from lora_dist.demo import digits, fashion_mnist
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import load_base
from lora_dist.model.base.license import license_of
from lora_dist.settings.train import DataSettings


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "digits"
    digits.write(root)
    return root


def test_a_name_that_is_not_of_the_demo_is_left_alone() -> None:
    for name in ("google/vit", "./demo", "runs/demo:1"):
        assert not demo.is_packaged(name)
        assert demo.local_path(name) == name


@pytest.mark.parametrize(
    "name", ["demo:vitt", "demo:", "demo:digits", "demo:digits/test", "demo:vit/model.safetensors"]
)
def test_an_unknown_name_is_answered_with_the_known_ones(
    name: str, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_DIST_CACHE", str(written.parent))
    with pytest.raises(UserError, match=r"demo:vit, demo:digits/train and demo:digits/validation"):
        demo.local_path(name)


def test_the_configuration_of_the_base_is_packaged() -> None:
    directory = Path(demo.local_path("demo:vit_config"))
    assert (directory / "config.json").is_file()
    assert (directory / "preprocessor_config.json").is_file()


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_DIST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot write the digits to .*\(Not a directory\); LORA_DIST_CACHE sets"):
        demo.local_path("demo:digits/train")


def test_the_digits_are_written_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_DIST_CACHE", str(tmp_path))
    assert demo.local_path("demo:digits/train") == str(tmp_path / "digits" / "train")
    first = sorted(path for path in (tmp_path / "digits").rglob("*.png"))
    times = {path: path.stat().st_mtime_ns for path in first}
    assert demo.local_path("demo:digits/validation") == str(tmp_path / "digits" / "validation")
    assert {path: path.stat().st_mtime_ns for path in first} == times, "the second call writes nothing"
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_the_digits_are_those_of_scikit_learn(written: Path) -> None:
    data = load_data(DataSettings(train_dir=str(written / "train"), validation_dir=str(written / "validation")), seed=0)
    assert data.labels == list("0123456789")
    assert (len(data.train), len(data.validation)) == (1442, 355)
    source = load_digits()
    fifth_seven = np.flatnonzero(source.target == 7)[4]
    pixels = np.asarray(Image.open(written / "validation" / "7" / "0004.png"))
    np.testing.assert_array_equal(np.round(pixels / (255 / 16)), source.images[fifth_seven])
    assert np.bincount(data.validation.labels).min() >= 34


def test_many_processes_may_want_the_digits_at_once(tmp_path: Path) -> None:
    """As on the first run under a launcher on several nodes that share a home directory."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=digits.write, args=(tmp_path / "digits",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert len(list((tmp_path / "digits").rglob("*.png"))) == 1797


def _idx(values: np.ndarray) -> bytes:
    """The format of the original distribution: a magic number, the sizes, and bytes."""
    return gzip.compress(struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes())


def test_fashion_mnist_becomes_a_data_set(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (20, 28, 28), dtype=np.uint8), np.arange(20, dtype=np.uint8) % 10
    (tmp_path / "source").mkdir()
    for prefix, count in (("train", 20), ("t10k", 10)):
        (tmp_path / "source" / f"{prefix}-images-idx3-ubyte.gz").write_bytes(_idx(images[:count]))
        (tmp_path / "source" / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(_idx(labels[:count]))
    fashion_mnist.write(tmp_path / "out", tmp_path / "source")
    table = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(np.asarray(table[13]["image"]), images[13])
    data = load_data(DataSettings(dataset_name=str(tmp_path / "out"), validation_split="test"), seed=0)
    assert data.labels[9] == "Ankle boot"
    assert data.train.labels.tolist() == labels.tolist()
    assert len(data.validation) == 10


def test_fashion_mnist_that_is_not_installed_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist.write(tmp_path / "out", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_the_commands_refuse_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (digits.main, fashion_mnist.main):
        with pytest.raises(SystemExit) as end:
            command([])
        assert end.value.code == 2
        assert "usage: python -m lora_dist.demo" in capsys.readouterr().err


def test_the_command_writes_and_says_where(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(written / "validation" / "1", tmp_path / "digits" / "validation" / "1")
    digits.main([str(tmp_path / "digits")])
    assert f"wrote {tmp_path / 'digits'}/train" in capsys.readouterr().out


def test_a_result_names_its_base_as_any_machine_finds_it() -> None:
    base = load_base("demo:vit", ["a", "b"])
    assert base.identity()["model_name_or_path"] == "demo:vit"
    license_ = license_of(base.name, base.revision, is_on_hub=False)
    assert license_ is not None
    assert license_.section()[2] == "The base model `demo:vit` has the license apache-2.0."
