"""The notebook of the documentation runs from its first cell to its last, and is kept without outputs."""

import json
import subprocess
import sys
from pathlib import Path

from lora_dist_testing.launching import ROOT, TIMEOUT, environment

NOTEBOOK = ROOT / "docs" / "guide.ipynb"
CHECKS = """
assert result.metrics["eval_accuracy"] > 0.7, result.metrics
assert len(predictions) == 355
assert sum(scores[0]["label"] != file.parent.name for file, scores in worst) == 16
assert [classifier(image)] == [classifier(str(files[0]))]
"""


def test_the_notebook_goes_the_way_of_the_guide(tmp_path: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join(["".join(cell["source"]) for cell in code] + [CHECKS]), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "accuracy" in result.stdout
