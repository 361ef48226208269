"""Commands without the right of root to read and write everything."""

import os
import shutil
import sys

import pytest

RIGHTS = "-dac_override,-dac_read_search"


def python(*arguments: object) -> list[str]:
    """The words of a command that runs Python with what any user may; skips the test where root cannot give it up."""
    words = [sys.executable, *map(str, arguments)]
    if os.geteuid() != 0:
        return words
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, to be less than root")
    return ["setpriv", f"--bounding-set={RIGHTS}", f"--inh-caps={RIGHTS}", *words]
