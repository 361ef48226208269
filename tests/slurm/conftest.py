"""A cluster for the tests of a module, and directories for each test."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lora_dist_testing.cluster import Cluster, why_not


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A running cluster; a module's `SLURMD_TIMEOUT` says how soon Slurm takes a silent node for down."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    # Not pytest's directory: the path of a socket is at most 107 characters long.
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(directory, getattr(request.module, "SLURMD_TIMEOUT", 300))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where jobs are submitted: slurm/ is not there, and the path has what careless scripts trip over."""
    directory = tmp_path / "it's a place"
    directory.mkdir()
    return directory


@pytest.fixture
def scratch() -> Iterator[Path]:
    """The scratch disk of the nodes, with a short path: worker processes put sockets there."""
    with tempfile.TemporaryDirectory(prefix="scratch-") as directory:
        yield Path(directory)
