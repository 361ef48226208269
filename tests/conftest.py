"""Models and folders that many tests share, and what machines the markers need."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lora_dist_testing.tiny import ARCHITECTURES, make_folder, make_model
from lora_dist_testing.web import CHROMIUM

from lora_dist.processes.signals import STOP_SIGNALS

pytest.register_assert_rewrite("lora_dist_testing.launching")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts commands in the background so, and the commands under test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


MISSING = {
    "root": os.geteuid() != 0 and "needs root",
    "browser": CHROMIUM is None and "needs Chromium: apt-get install chromium",
}
"""For each marker, why its tests cannot run on this machine; False if they can."""


def pytest_configure(config: pytest.Config) -> None:
    """Hides all GPUs, also from what tests start, unless `-m gpu` selects the tests that need one."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    MISSING["gpu"] = not torch.cuda.is_available() and "needs a GPU, and -m gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests whose markers name something that this machine lacks."""
    for item in items:
        for name, reason in MISSING.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
    """Puts back logging: a command that a test calls in its process would leave a handler with a closed stream."""
    root, package = logging.getLogger(), logging.getLogger("lora_dist")
    handlers, level, level_of_package = root.handlers[:], root.level, package.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    package.setLevel(level_of_package)


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT of two classes, on disk."""
    return make_model(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/` with 11, 9 and 7 images of three classes, and `validation/` with 3 of each."""
    root = tmp_path_factory.mktemp("photos")
    make_folder(root / "train", per_class=(11, 9, 7))
    make_folder(root / "validation", per_class=3, first=100)
    return root


@pytest.fixture(scope="session")
def misled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `photos`, but the validation images are under other names: the more is learned, the worse it gets."""
    root = tmp_path_factory.mktemp("misled")
    make_folder(root / "train", per_class=(11, 9, 7))
    make_folder(root / "validation", classes=("b", "c", "a"), per_class=3, first=100)
    return root


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each supported architecture in turn, on disk; the directory has the architecture's name."""
    return make_model(tmp_path_factory.mktemp("architectures") / request.param, request.param)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts back what signals do, for tests that stop a run: it leaves them ignored."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
