"""Parses flags, YAML files and packaged recipes into settings, and reports all problems at once."""

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lora_dist.errors import UserError
from lora_dist.processes.huge_pages import is_restarted
from lora_dist.settings import trainer_flags
from lora_dist.settings.fields import Contradiction
from lora_dist.settings.yaml_text import parse_yaml

logger = logging.getLogger(__name__)
S = TypeVar("S", bound=BaseModel)
RECIPES = resources.files("lora_dist") / "recipes"
_NO_VALUE = object()


class _Field:
    """A setting: its group and its pydantic field."""

    def __init__(self, group: str, info: FieldInfo) -> None:
        self.group = group
        self.info = info
        extra = info.json_schema_extra
        self._word = str(extra["several"]) if isinstance(extra, dict) and "several" in extra else ""
        self.takes_several = bool(self._word)
        self.is_bool = info.annotation is bool
        self.default = info.get_default(call_default_factory=True)

    def help(self) -> str:
        text = (self.info.description or "").replace("\n", " ").replace("%", "%%")
        if self._has_many_choices:
            text += f" One of {', '.join(self._choices)}."
        default = self.default
        if default is None or default in ([], {}):
            return text
        shown = ",".join(default) if isinstance(default, list) else str(default).lower() if self.is_bool else default
        return f"{text} (default: {shown})"

    def number_type(self) -> type[int] | type[float] | None:
        """The type of the numbers that the setting takes; None if it takes none."""
        return next((kind for kind in (int, float) if kind in _members(self.info.annotation)), None)

    def metavar(self) -> str:
        if self._word:
            return self._word
        types = (get_origin(annotation) or annotation for annotation in _members(self.info.annotation))
        words = [_METAVARS[kind] for kind in types if kind in _METAVARS]
        return "|".join([*words, *(["NAME"] if self._has_many_choices else self._choices)]) or "TEXT"

    @property
    def _choices(self) -> list[str]:
        literals = (one for one in _members(self.info.annotation) if get_origin(one) is Literal)
        return [str(choice) for literal in literals for choice in get_args(literal)]

    @property
    def _has_many_choices(self) -> bool:
        """Whether the choices are too long for the line of the flag in `--help`."""
        return len("|".join(self._choices)) > _WIDEST_CHOICES


_WIDEST_CHOICES = 60
_METAVARS = {int: "N", float: "X", str: "TEXT", bool: "BOOL", list: "A,B", dict: "A=N,B=N"}


def _members(annotation: Any) -> list[Any]:
    """Members of a union, through `Annotated`."""
    if get_origin(annotation) in (None, Literal, list, dict):
        return [annotation]
    return [member for argument in get_args(annotation) for member in _members(argument)]


def flat_fields(settings_class: type[BaseModel]) -> dict[str, _Field]:
    """Fields by flat name of a class whose own fields are groups of settings."""
    fields: dict[str, _Field] = {}
    for group, outer in settings_class.model_fields.items():
        for name, info in _group_class(outer).model_fields.items():
            assert name not in fields, f"{name} is in two groups"
            fields[name] = _Field(group, info)
    return fields


def _group_class(field: FieldInfo) -> type[BaseModel]:
    assert isinstance(field.annotation, type)
    assert issubclass(field.annotation, BaseModel)
    return field.annotation


def flatten(settings: BaseModel) -> dict[str, Any]:
    """Settings by flat name, in the order of `--help`; `--config` reads them back from YAML."""
    return {name: value for group in settings.model_dump(mode="json").values() for name, value in group.items()}


def parse(
    settings_class: type[S],
    argv: list[str],
    *,
    prog: str,
    description: str,
    contradictions: Callable[[S], Iterable[Contradiction]],
    takes_config: bool = True,
) -> S:
    """Builds settings from defaults, the YAML of `--config`, and flags; later ones override earlier ones.

    Raises:
        UserError: Lists all unknown names, invalid values and contradictions.
    """
    fields = flat_fields(settings_class)
    parser = _parser(settings_class, fields, prog, description, takes_config)
    flags, leftover = parser.parse_known_args([_underscored(token) for token in argv])
    found = {name: values for name, values in vars(flags).items() if values is not None}
    given = {name: values[-1] for name, values in found.items()}
    problems = list(_unknown_flags(leftover, [*fields, *(["config"] if takes_config else [])]))
    for name, values in found.items():
        if name == "config" or (fields[name].takes_several and isinstance(fields[name].default, list)):
            problems += _lost(name, values)
        else:
            note_repeats(name, values)
    return _combined(settings_class, given, problems, prog, contradictions)


def from_keywords(
    settings_class: type[S],
    config: str | os.PathLike[str] | None,
    keywords: Mapping[str, Any],
    *,
    prog: str,
    contradictions: Callable[[S], Iterable[Contradiction]],
) -> S:
    """Builds settings as `parse` does, from a YAML file or recipe and values by flat name; None is the default.

    Raises:
        UserError: as `parse`.
    """
    fields = flat_fields(settings_class)
    problems = [f"{name}: unknown setting{did_you_mean(name, fields)}" for name in keywords if name not in fields]
    given = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in {**keywords, "config": config}.items()
        if value is not None and name in {*fields, "config"}
    }
    return _combined(settings_class, given, problems, prog, contradictions)


def _combined(
    settings_class: type[S],
    given: dict[str, Any],
    problems: list[str],
    prog: str,
    contradictions: Callable[[S], Iterable[Contradiction]],
) -> S:
    """Adds the YAML of `config` to the values that were given, and reports its problems with those found before."""
    fields = flat_fields(settings_class)
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    config = given.pop("config", None)
    unread = False
    if config is not None and config is not _NO_VALUE:
        try:
            content = _read_yaml(_find_config(config))
        except UserError as error:
            content, unread = {}, True
            problems.append(str(error))
        for name, value in content.items():
            if name in fields:
                values[name], origin[name] = value, f" (in {config})"
            elif isinstance(value, dict):
                inner = ", ".join(map(str, value))
                problems.append(f"{name}: settings have no sections; move {inner} to the top level (in {config})")
            else:
                problems.append(f"{name}: unknown setting (in {config}){did_you_mean(str(name), fields)}")
    elif config is _NO_VALUE:
        problems.append(f"--config: needs a path or a recipe: {', '.join(recipe_names())}")
    for name, value in given.items():
        if value is _NO_VALUE:
            problems.append(f"--{name}: needs a value")
        else:
            values[name], origin[name] = value, ""

    settings, invalid = _validate(settings_class, fields, values)
    problems += [f"--{name}: {message}{origin[name]}" for name, message in invalid.items()]
    # If the file is unreadable, settings may only seem to be missing.
    for contradiction in () if unread else contradictions(settings):
        if not invalid.keys() & set(contradiction.names):
            flags = ", ".join("--" + name for name in contradiction.names)
            problems.append(f"{flags}: {contradiction.message}")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError("\n  ".join([f"{count} with the settings of {prog}", *problems]))
    return settings


def _parser(
    settings_class: type[BaseModel], fields: Mapping[str, _Field], prog: str, description: str, takes_config: bool
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, usage=f"{prog} [--setting value ...]", description=description, allow_abbrev=False
    )
    if takes_config:
        parser.add_argument(
            "--config",
            action="append",
            nargs="?",
            const=_NO_VALUE,
            metavar="NAME|FILE",
            help=f"YAML file of settings or packaged recipe ({', '.join(recipe_names())}). Flags override it.",
        )
    # The groups of the command itself come before those that it shares with training.
    own = settings_class.__annotations__
    groups = {
        name: parser.add_argument_group((_group_class(info).__doc__ or name).splitlines()[0])
        for name, info in sorted(settings_class.model_fields.items(), key=lambda item: item[0] not in own)
    }
    for name, field in fields.items():
        groups[field.group].add_argument(
            f"--{name}",
            action="append",
            nargs="*" if field.takes_several else "?",
            const=None if field.takes_several else "true" if field.is_bool else _NO_VALUE,
            metavar=field.metavar(),
            help=field.help(),
        )
    return parser


def _lost(name: str, values: Sequence[Any]) -> Iterable[str]:
    """Yields a problem if --config or a list of words has other values the second time: only the last would count."""
    if all(value == values[0] for value in values):
        return
    if name == "config":
        yield f"--config: given {_times(values)}, and one file is read; put the settings of all into one"
    else:
        yield f"--{name}: given {_times(values)}; write --{name} {' '.join(word for value in values for word in value)}"


def note_repeats(name: str, values: Sequence[Any]) -> None:
    """Logs that the last value of a repeated flag counts; a script may put defaults before the flags of its user."""
    if len({str(value) for value in values}) > 1 and os.environ.get("RANK", "0") == "0" and not is_restarted():
        last = " ".join(values[-1]) if isinstance(values[-1], list) else values[-1]
        shown = "" if last is _NO_VALUE else f", {last}"
        logger.warning("--%s was given %s; the last value counts%s", name, _times(values), shown)


def _times(values: Sequence[Any]) -> str:
    return "twice" if len(values) == 2 else f"{len(values)} times"


def _underscored(token: str) -> str:
    """Turns `--learning-rate=1e-3` into `--learning_rate=1e-3`."""
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _unknown_flags(leftover: list[str], known: Collection[str]) -> Iterable[str]:
    after_flag = False
    for token in leftover:
        if token.startswith("-"):
            name = token.lstrip("-").partition("=")[0]
            yield f"{token.partition('=')[0]}: unknown flag{did_you_mean(name, known)}"
            after_flag = True
        elif not after_flag:
            is_config = "config" in known and token.endswith((".yaml", ".yml", ".json"))
            yield f"{token}: value without a flag" + (f"; did you mean --config {token}?" if is_config else "")


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Returns the end of a sentence that suggests a known setting for an unknown one; empty if none is similar."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return trainer_flags.hint(name, known) or (f"; did you mean --{close[0]}?" if close else "")


def _find_config(name: str) -> Path:
    # `Path.is_file` raises if the name is too long.
    if os.path.isfile(name):  # noqa: PTH113
        return Path(name)
    if name in recipe_names():
        return Path(str(RECIPES / f"{name}.yaml"))
    hint = difflib.get_close_matches(name, recipe_names(), n=1)
    raise UserError(
        f"--config {name}: no such file or recipe"
        + (f"; did you mean {hint[0]}?" if hint else ".")
        + f" Recipes: {', '.join(recipe_names())}."
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not a YAML file: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected 'setting: value' lines, found a {type(content).__name__}")
    return content


def _validate(
    settings_class: type[S], fields: Mapping[str, _Field], values: Mapping[str, Any]
) -> tuple[S, dict[str, str]]:
    """Returns settings built from the valid values, and a message for each invalid one, by name."""

    def build(names: Iterable[str]) -> S:
        grouped: dict[str, dict[str, Any]] = {group: {} for group in settings_class.model_fields}
        for name in names:
            grouped[fields[name].group][name] = values[name]
        return settings_class.model_validate(grouped)

    try:
        return build(values), {}
    except ValidationError as error:
        messages: dict[str, list[str]] = {}
        for entry in error.errors():
            messages.setdefault(str(entry["loc"][1]), []).append(entry["msg"].removeprefix("Value error, "))
    invalid = {
        name: f"{values[name]!r} is not valid: {' or '.join(dict.fromkeys(found))}" for name, found in messages.items()
    }
    return build(name for name in values if name not in invalid), invalid


def argv_or(arguments: list[str] | None) -> list[str]:
    """Returns `arguments`, or those of the command line for None."""
    return sys.argv[1:] if arguments is None else arguments


def recipe_names() -> list[str]:
    """Names of the packaged recipes that `--config` takes."""
    return sorted(Path(entry.name).stem for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))
