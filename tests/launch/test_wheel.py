"""The wheel has everything that a user of an installed lora_dist needs."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lora_dist.settings.cli import recipe_names

ROOT = Path(__file__).parents[2]
FOR_THE_BUILD = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "lora_dist", "accelerate_configs")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with lora_dist from a wheel; everything that it depends on comes from this environment."""
    root = tmp_path_factory.mktemp("wheel")
    for name in FOR_THE_BUILD:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (root / "source").mkdir(exist_ok=True)
            shutil.copy(source, root / "source")
    pip = [sys.executable, "-m", "pip", "-q"]
    # An environment without setuptools fetches it for the build.
    isolation = ["--no-build-isolation"] if find_spec("setuptools") else []
    subprocess.run([*pip, "wheel", "--no-deps", *isolation, "-w", root, root / "source"], check=True)
    (wheel,) = root.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", root / "installed", wheel], check=True)
    return root / "installed"


def _python(installed: Path, *words: object) -> str:
    """What Python prints, with the installed package and outside the checkout."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, *map(str, words)]
    result = subprocess.run(command, env=environment, cwd=installed.parent, capture_output=True, text=True, check=True)
    return result.stdout


def test_the_wheel_has_every_file_of_the_package(installed: Path) -> None:
    here = {path.relative_to(ROOT / "lora_dist") for path in (ROOT / "lora_dist").rglob("*") if path.is_file()}
    there = {path.relative_to(installed / "lora_dist") for path in (installed / "lora_dist").rglob("*")}
    assert not {path for path in here if "__pycache__" not in path.parts} - there
    assert Path("py.typed") in there


def test_help_comes_from_the_wheel(installed: Path) -> None:
    assert "--learning_rate" in _python(installed, "-m", "lora_dist.train", "--help")
    code = "import lora_dist, lora_dist.settings.cli as cli; print(lora_dist.__file__, *cli.recipe_names())"
    file, *recipes = _python(installed, "-c", code).split()
    assert Path(file).is_relative_to(installed)
    assert recipes == recipe_names()


def test_a_recipe_is_read_from_the_wheel(installed: Path) -> None:
    code = (
        "from lora_dist.settings import cli, train, train_contradictions\n"
        "settings = cli.parse(train.Settings, ['--config', 'demo'], prog='', description='', "
        "contradictions=train_contradictions.contradictions)\nprint(settings.run.output_dir)"
    )
    assert _python(installed, "-c", code) == "runs/demo\n"


def test_launch_files_are_listed_and_copied_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    source = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
    listed = _python(installed, "-m", "lora_dist.launch_files").splitlines()
    assert [line.partition("  ")[0] for line in listed] == [
        str(installed / "lora_dist" / "accelerate_configs" / file.name) for file in source
    ]
    assert "# One process: a laptop, or one GPU." in next(line for line in listed if "single.yaml" in line)
    _python(installed, "-m", "lora_dist.launch_files", tmp_path / "new" / "launch")
    copied = sorted((tmp_path / "new" / "launch").iterdir())
    assert [(file.name, file.read_bytes()) for file in copied] == [(file.name, file.read_bytes()) for file in source]


def test_launch_files_do_not_replace_files(tmp_path: Path) -> None:
    (tmp_path / "single.yaml").write_text("mine")
    command = [sys.executable, "-m", "lora_dist.launch_files", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path} already contains single.yaml; use another directory\n"
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]
