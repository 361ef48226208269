"""Optional packages: the error says what to install."""

import pytest

from lora_dist import extras
from lora_dist.errors import UserError


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    extras.require("onnx", "--onnx", "json")
    with pytest.raises(UserError, match=r"--onnx needs no_such_runtime .*pip install 'lora_dist\[onnx\]'"):
        extras.require("onnx", "--onnx", "json", "no_such_runtime")
