"""Prints the lowest release of each dependency that `pyproject.toml` allows, for `pip install -r`."""

import re
import tomllib
from pathlib import Path


def lowest() -> list[str]:
    """Requirements such as `torch==2.6`."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["demo"], *extras["onnx"], *extras["serve"]]
    return [re.sub(">=", "==", requirement) for requirement in requirements]


if __name__ == "__main__":
    print("\n".join(lowest()))
