"""The extension of DeepSpeed for CPUs."""

from pathlib import Path

import pytest

from lora_dist.errors import UserError
from lora_dist.processes.deepspeed_extension import compile_extension


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed compiles while it connects, where this would look like an error of the network."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"needs g\+\+ and ninja"):
        compile_extension()
