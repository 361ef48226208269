"""Rules that hold the package together: which way imports go, what stays light, and that everything is described."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from lora_dist_testing.lowest import lowest
from packaging.version import Version
from pydantic import BaseModel

from lora_dist.settings.audit import AuditSettings
from lora_dist.settings.bench import BenchSettings
from lora_dist.settings.fields import Group
from lora_dist.settings.predict import PredictSettings
from lora_dist.settings.sweep import SweepSettings
from lora_dist.settings.train import Settings

PACKAGE = Path(__file__).parents[2] / "lora_dist"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {
    ".".join(("lora_dist", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): ast.parse(
        path.read_text(encoding="utf-8")
    )
    for path in FILES
}


def _folder(module: str) -> str:
    """The folder of the package that a module lies in; a module in none stands for itself."""
    return f"{module}.".split(".")[1]


def _imports(tree: ast.AST) -> Iterator[str]:
    """Modules imported anywhere in `tree`, inside functions as well; those for type checkers alone left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import of {node.module}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in TREES else str(node.module)
        else:
            yield from _imports(node)


def _imports_at_start(tree: ast.Module) -> Iterator[str]:
    """Modules imported by importing this one."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from _imports(ast.Module([node], []))


def _internal(names: Iterator[str]) -> set[str]:
    return {name for name in names if name in TREES and name != "lora_dist"}


def _reached(*modules: str, imports: Callable[[ast.Module], Iterator[str]] = _imports) -> set[str]:
    """All modules, of this package and others, that `modules` import, directly or through others."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        for name in set(imports(TREES[waiting.pop()])) - found:
            found.add(name)
            if name in TREES:
                waiting.append(name)
    return found


def test_the_rules_see_the_package() -> None:
    assert {"lora_dist.train", "lora_dist.settings.train", "lora_dist.demo.digits"} <= TREES.keys()
    assert "torch" in _reached("lora_dist.training.loop", imports=_imports_at_start)
    assert "lora_dist.training.assembly" in _reached("lora_dist.train")


def test_imports_go_one_way() -> None:
    """`static_order` raises CycleError, which names the modules of the cycle."""
    graph = {module: _internal(_imports(tree)) - {module} for module, tree in TREES.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("lora_dist.settings.train") < order.index("lora_dist.train")


def test_folders_import_one_way() -> None:
    graph: dict[str, set[str]] = {}
    for module, tree in TREES.items():
        graph.setdefault(_folder(module), set()).update(_folder(name) for name in _internal(_imports(tree)))
    order = list(TopologicalSorter({folder: uses - {folder} for folder, uses in graph.items()}).static_order())
    assert order.index("data") < order.index("model") < order.index("engines") < order.index("training")
    assert order.index("model") < order.index("deployment")


@pytest.mark.parametrize(
    ("folder", "floors"),
    [
        ("data", ({"sampling", "pixels"}, {"sources"}, {"batch", "cache", "feature_batches", "prefetch"}, {"loader"})),
        ("model", ({"base"}, {"lora"}, {"trained", "features", "heat_map"})),
    ],
)
def test_imports_inside_a_folder_go_down(folder: str, floors: tuple[set[str], ...]) -> None:
    """From the loader to batches, sources, order and pixels; from trained classifiers to LoRA to the base model."""
    floor_of = {f"lora_dist.{folder}.{room}": number for number, rooms in enumerate(floors) for room in rooms}

    def floor(module: str) -> int | None:
        return next((floor_of[room] for room in floor_of if f"{module}.".startswith(f"{room}.")), None)

    modules = {module: floor(module) for module in TREES if module.startswith(f"lora_dist.{folder}.")}
    assert None not in modules.values()
    upward = [
        (module, name)
        for module in modules
        for name in _internal(_imports(TREES[module])) & modules.keys()
        if modules[name] > modules[module]
    ]
    assert not upward


def test_no_module_imports_a_command() -> None:
    commands = {"lora_dist.train", "lora_dist.predict"}
    commands |= {f"lora_dist.{name}.__main__" for name in ("audit", "bench", "sweep")}
    importers = {module for module, tree in TREES.items() if _internal(_imports(tree)) & commands}
    assert not importers - commands


@pytest.mark.parametrize(
    "name",
    [
        *("settings.train", "settings.cli", "settings.predict", "settings.audit", "settings.bench", "errors", "demo"),
        *("train", "predict", "training.schedule", "audit.__main__"),
        *("bench.__main__", "bench.compare", "bench.results", "settings.sweep", "sweep.__main__"),
    ],
)
def test_what_reads_settings_imports_nothing_heavy(name: str) -> None:
    heavy = {"torch", "torchvision", "transformers", "peft", "accelerate", "datasets", "evaluate", "numpy", "PIL"}
    assert not {module.partition(".")[0] for module in _reached(f"lora_dist.{name}", imports=_imports_at_start)} & heavy


def test_who_imports_peft() -> None:
    """The guide's recipe in the benchmark does, too: it is not ours."""
    importers = {module for module, tree in TREES.items() if any(_root(name) == "peft" for name in _imports(tree))}
    assert importers == {
        "lora_dist.model.lora.adapters",
        "lora_dist.model.lora.injection",
        "lora_dist.model.lora.lora_layer",
        "lora_dist.bench.trainer_baseline",
    }


def _root(name: str) -> str:
    return name.partition(".")[0]


def test_prediction_needs_no_accelerator_and_no_deepspeed() -> None:
    found = _reached("lora_dist.predict")
    assert "lora_dist.model.trained.bundle" in found
    assert not {_root(name) for name in found} & {"accelerate", "deepspeed"}


def _public(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public functions and classes of a module, and the public methods of these."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner


def _interfaces() -> set[str]:
    """Names of methods that a protocol of the package describes; classes that follow it need not repeat that."""
    return {
        inner.name
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases)
        for inner in node.body
        if isinstance(inner, ast.FunctionDef) and ast.get_docstring(inner)
    }


@pytest.mark.parametrize("module", TREES)
def test_everything_public_is_described(module: str) -> None:
    tree = TREES[module]
    described = _interfaces()
    bare = [
        name for name, node in _public(tree) if not ast.get_docstring(node) and name.rpartition(".")[2] not in described
    ]
    assert not bare
    assert ast.get_docstring(tree)


@pytest.mark.parametrize("settings", [Settings, PredictSettings, AuditSettings, BenchSettings, SweepSettings])
def test_names_of_settings_are_unique(settings: type[BaseModel]) -> None:
    names = [name for group in settings.model_fields.values() for name in group.annotation.model_fields]
    assert len(names) == len(set(names)) > 5


def _groups(settings: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for group, field in settings.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, Group)
        yield group, field.annotation


SETTINGS = [(group, name) for group, annotation in _groups(Settings) for name in annotation.model_fields]


@pytest.mark.parametrize(("group", "name"), SETTINGS)
def test_every_setting_is_read(group: str, name: str) -> None:
    """Somewhere outside `config.py`, as an attribute."""
    readers = [
        module
        for module, tree in TREES.items()
        if module != "lora_dist.settings.train"
        and any(isinstance(node, ast.Attribute) and node.attr == name for node in ast.walk(tree))
    ]
    assert readers, f"nothing reads {group}.{name}"


def test_reading_settings_loads_no_torch() -> None:
    """In a real process: what a package of `lora_dist` imports may itself import more than can be seen here."""
    code = (
        "import sys, lora_dist.settings.train, lora_dist.settings.cli, lora_dist.errors\n"
        "import lora_dist.predict, lora_dist.train, lora_dist.audit.__main__\n"
        "print(*sorted({'torch', 'transformers', 'datasets', 'peft', 'accelerate', 'numpy'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_an_audit_needs_no_torch() -> None:
    found = _reached(*(name for name in TREES if name.startswith("lora_dist.audit")))
    # Packaged data alone needs more, which `demo` imports where it is asked for.
    assert not {_root(name) for name in found} & {"torch", "torchvision", "transformers", "datasets", "accelerate"}


@pytest.mark.parametrize("settings", [PredictSettings, AuditSettings, BenchSettings, SweepSettings])
def test_every_setting_of_a_command_is_read(settings: type[BaseModel]) -> None:
    names = [name for _, group in _groups(settings) for name in group.model_fields]
    read = {node.attr for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not set(names) - read


@pytest.mark.parametrize("name", [name for name in TREES if _folder(name) in {"predict", "deployment"}])
def test_deployment_reaches_neither_the_loop_nor_the_engines(name: str) -> None:
    found = _reached(name)
    assert not {_folder(module) for module in found & TREES.keys()} & {"train", "training", "engines"}
    assert not {_root(module) for module in found} & {"accelerate", "deepspeed"}


def test_no_two_test_files_have_one_name() -> None:
    """pytest would collect the first and refuse the second. It keeps the fixtures of folders apart by itself."""
    names = [path.name for path in Path(__file__).parents[1].rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_no_pinned_release_is_older_than_the_lowest_allowed() -> None:
    lines = (PACKAGE.parent / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = dict(line.lower().split("==") for line in lines)
    for requirement in lowest():
        name, version = requirement.partition(";")[0].lower().split("==")
        assert Version(pinned[name]) >= Version(version), name
