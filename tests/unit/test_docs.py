"""The commands, flags, paths and links of the documentation exist."""

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import dropwhile
from pathlib import Path
from urllib.parse import unquote

import pytest
from accelerate.commands.launch import launch_command_parser
from pydantic import BaseModel

from lora_dist.errors import UserError
from lora_dist.settings import cli, trainer_flags
from lora_dist.settings.audit import AuditSettings
from lora_dist.settings.bench import BenchSettings
from lora_dist.settings.predict import PredictSettings
from lora_dist.settings.sweep import SweepSettings
from lora_dist.settings.train import Settings

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [
    README,
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "slurm/README.md", "tests/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMANDS: dict[str, type[BaseModel]] = {
    "lora_dist.train": Settings,
    "lora_dist.predict": PredictSettings,
    "lora_dist.audit": AuditSettings,
    "lora_dist.bench": BenchSettings,
    "lora_dist.bench.compare": BenchSettings,
    "lora_dist.sweep": SweepSettings,
}
TAKES_CONFIG = {"lora_dist.train", "lora_dist.bench", "lora_dist.bench.compare", "lora_dist.sweep"}
BATCH_SCRIPTS = {"slurm/train.sbatch", "slurm/sweep.sbatch", "slurm/folds.sbatch"}
"""Scripts that pass their flags to lora_dist.train."""

ACCELERATE_FLAGS = {flag.lstrip("-") for flag in launch_command_parser()._option_string_actions}
OTHER_PROGRAMS = {
    *("array", "batch", "cpus-per-task", "dependency", "no-requeue", "nodes", "signal", "wrap"),  # Slurm
    *("check", "help"),
}
"""Flags of programs other than ours and accelerate's that the text may name."""


def code_lines(text: str) -> Iterator[str]:
    """The commands of all code blocks, fenced or indented, with continued lines joined."""
    fenced, pending = False, ""
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
            continue
        if not fenced and not line.startswith("    "):
            continue
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            shlex.split(pending, comments=True)
        except ValueError:  # a quote that ends on a later line
            pending += "\n"
            continue
        yield pending
        pending = ""


def inline_code(text: str) -> list[str]:
    """The text between single backticks, outside code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, without those that only stand for others."""
    words: list[str] = []
    for word in shlex.split(line, comments=True):
        if word in ("|", "&&", ">", ">>", ";"):
            yield words
            words = []
        elif "…" not in word and word != "..." and not re.fullmatch(r"\$\w+", word):
            words.append(word)
    yield words


def command_problems(line: str) -> Iterator[str]:
    """What is wrong with a command: an unknown module, flag or value, or an unknown target of make."""
    for words in simple_commands(line):
        name, arguments = "", []
        if "-m" in words and words[words.index("-m") + 1].startswith("lora_dist"):
            start = words.index("-m") + 1
            name, arguments = words[start], words[start + 1 :]
            if find_spec(name) is None:
                yield f"no module {name}"
        for script in BATCH_SCRIPTS.intersection(words):
            after = words[words.index(script) + 1 :]
            name, arguments = "lora_dist.train", list(dropwhile(lambda word: not word.startswith("--"), after))
        if name in COMMANDS:
            yield from flag_problems(name, arguments[name == "lora_dist.bench.compare" :])
        if words[:2] == ["accelerate", "launch"]:
            before = words[: words.index("-m")] if "-m" in words else words
            flags = {word.lstrip("-").partition("=")[0] for word in before if word.startswith("--")}
            yield from (f"accelerate launch has no --{flag}" for flag in flags - ACCELERATE_FLAGS)
        if words[:1] == ["make"]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            yield from (f"make has no {word}" for word in words[1:] if not re.search(rf"^{word}:", makefile, re.M))


def flag_problems(name: str, arguments: list[str]) -> Iterator[str]:
    """What the settings of a command say of its arguments, whatever files there are."""
    try:
        cli.parse(
            COMMANDS[name],
            arguments,
            prog=name,
            description="",
            contradictions=lambda _: (),
            takes_config=name in TAKES_CONFIG,
        )
    except UserError as error:
        yield str(error)


def inline_flag_problems(text: str) -> Iterator[str]:
    """Flags in the text that no program has."""
    known = {"config"} | {name for settings in COMMANDS.values() for name in cli.flat_fields(settings)}
    known |= (
        ACCELERATE_FLAGS
        | OTHER_PROGRAMS
        | trainer_flags.RENAMED.keys()
        | trainer_flags.OF_TIMM.keys()
        | trainer_flags.UNNECESSARY.keys()
        | trainer_flags.LAUNCH_FILES.keys()
    )
    for code in inline_code(text):
        for flag in re.findall(r"(?<!\S)--([A-Za-z][\w-]*)", code):
            if flag not in known:
                yield f"no flag --{flag} (in `{code}`)"


def path_problems(text: str) -> Iterator[str]:
    """Paths of this repository that do not exist; `*` matches as in a shell."""
    for found in re.findall(r"(?<![\w./-])((?:lora_dist|tests|slurm|accelerate_configs|docs)/[\w./*-]*)", text):
        path = found.rstrip(".")
        if not any(ROOT.glob(path.rstrip("/"))):
            yield f"no path {path}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def link_problems(page: Path, text: str) -> Iterator[str]:
    """Relative links and pictures whose file or anchor does not exist."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = unquote(target).partition("#")
        linked = (page.parent / file).resolve() if file else page
        if not linked.exists():
            yield f"no file {target}"
        elif anchor and anchor not in anchors(linked):
            yield f"no anchor {target}"


def problems(page: Path, text: str) -> list[str]:
    """All that is wrong with a page."""
    inline = (code for code in inline_code(text) if code.startswith(("accelerate launch", "make ")))
    lines = [*code_lines(text), *inline]
    return [
        *(problem for line in lines for problem in command_problems(line)),
        *inline_flag_problems(text),
        *path_problems(text),
        *link_problems(page, text),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_flags_paths_and_links_exist(page: Path) -> None:
    assert problems(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```bash\npython -m lora_dist.train --learning_rat 1e-3\n```", "--learning_rat: unknown flag"),
        ("```bash\npython -m lora_dist.train \\\n    --lora_r many\n```", "--lora_r: 'many' is not valid"),
        ("```bash\npython -m lora_dist.train --config food102\n```", "--config food102: no such file or recipe"),
        ("    python -m lora_dist.predict --train_dir photos", "--train_dir: unknown flag"),
        ("    python -m lora_dist.audit --config demo", "--config: unknown flag"),
        ("    python -m lora_dist.bench.compare ours --turns 3", "--turns: unknown flag"),
        ("    python -m lora_dist.evaluate", "no module lora_dist.evaluate"),
        ("    sbatch --nodes 2 slurm/train.sbatch --epoch 3", "--epoch: unknown flag"),
        ("    sbatch slurm/sweep.sbatch $grid runs/sweep --confg demo", "--confg: unknown flag"),
        ("    accelerate launch --config file.yaml -m lora_dist.train", "accelerate launch has no --config"),
        ("    make tests", "make has no tests"),
        ("With `--on_bad_images skip` it goes on.", "no flag --on_bad_images"),
        ("See lora_dist/trainer.py.", "no path lora_dist/trainer.py"),
        ("See `tests/units/`.", "no path tests/units/"),
        ("[page](docs/nothing.md)", "no path docs/nothing.md"),
        ("[page](nothing.md)", "no file nothing.md"),
        ("![picture](docs/architecture.md#not-a-heading)", "no anchor docs/architecture.md#not-a-heading"),
        ("[above](#not-a-heading)", "no anchor #not-a-heading"),
    ],
)
def test_what_does_not_exist_is_found(text: str, problem: str) -> None:
    assert problem in "\n".join(problems(README, text))


def test_a_quoted_value_may_go_over_lines() -> None:
    assert list(code_lines('    flags="--lora_r 8\n        --lora_alpha 8"\n    make test')) == [
        '    flags="--lora_r 8\n        --lora_alpha 8"',
        "    make test",
    ]


def test_the_pages_have_commands() -> None:
    """Otherwise a new kind of code block would leave nothing to check."""
    lines = [line for page in PAGES for line in code_lines(page.read_text(encoding="utf-8"))]
    assert sum("-m lora_dist.train" in line for line in lines) >= 15
    assert sum("-m lora_dist.predict" in line for line in lines) >= 10


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 220


def test_all_renamed_flags_of_trainer_and_timm_are_listed() -> None:
    page = (ROOT / "docs" / "coming-from-trainer.md").read_text(encoding="utf-8")
    assert [name for name, ours in trainer_flags.RENAMED.items() if f"| `{name}` | `--{ours}` |" not in page] == []
    rows = [line.split(" | ") for line in page.partition("## From timm")[2].splitlines() if line.startswith("| ")]
    for name, ours in trainer_flags.OF_TIMM.items():
        row = next((row for row in rows if f"`{name.replace('_', '-')}`" in row[0]), None)
        assert row is not None, name
        assert f"`--{ours}`" in row[1], name


def test_one_time_is_named_for_the_tests() -> None:
    files = [".ci/run", ".github/workflows/ci.yml", "CONTRIBUTING.md", "tests/README.md"]
    wanted = "25 minutes on two cores"
    assert [file for file in files if wanted not in (ROOT / file).read_text(encoding="utf-8")] == []
