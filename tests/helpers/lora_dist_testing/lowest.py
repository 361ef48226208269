"""Prints the lowest release of each dependency that `pyproject.toml` allows, for `pip install -r`."""

import tomllib
from itertools import chain
from pathlib import Path

CHECKERS = ("mypy", "ruff", "types-")
"""`make quality` alone uses these, and always as `constraints.txt` has them: they judge differently in each release."""


def lowest() -> list[str]:
    """Requirements such as `torch==2.8`.

    Raises:
        ValueError: one of them has no lower bound.
    """
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = list(chain(project["dependencies"], *project["optional-dependencies"].values()))
    used = [requirement for requirement in requirements if not requirement.startswith(CHECKERS)]
    if unbounded := [requirement for requirement in used if ">=" not in requirement]:
        raise ValueError(f"pyproject.toml: {', '.join(unbounded)}: no lowest release")
    return [requirement.replace(">=", "==") for requirement in used]


if __name__ == "__main__":
    print("\n".join(lowest()))
