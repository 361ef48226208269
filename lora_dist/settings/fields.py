"""Groups, value types and checks of paths that the settings of all commands share."""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)

from lora_dist.demo import is_packaged

SINGLE_LABEL, MULTI_LABEL = "single_label_classification", "multi_label_classification"
ProblemType = Literal["single_label_classification", "multi_label_classification"]
"""Values of `problem_type` in `transformers`: one class per image, or any number of labels."""


def several(word: str) -> dict[str, Any]:
    """`json_schema_extra` of a list setting whose flag takes several values, separated by spaces.

    In `--help`, `word` stands for one of them.
    """
    return {"several": word}


class Group(BaseModel):
    """A group of settings. The first line of its docstring is the heading in `--help`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_null(cls, value: Any) -> Any:
        """Refuses a NUL character, which YAML can express but no path, name or label can contain."""
        if isinstance(value, str) and "\0" in value:
            raise ValueError("it contains a NUL character")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _yaml_words(cls, value: Any, info: ValidationInfo) -> Any:
        """Turns the True or False that YAML 1.1 makes of a bare `yes` or `no` back into the word."""
        is_bool = cls.model_fields[str(info.field_name)].annotation is bool
        return ("no", "yes")[value] if isinstance(value, bool) and not is_bool else value


def _split_commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _named_numbers(value: Any) -> Any:
    """Makes a mapping of `NAME=N,NAME=N`."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if not all(name.strip() and number.strip() for name, _, number in pairs):
        raise ValueError("expected NAME=N, or several of these separated by commas")
    return {name.strip(): number.strip() for name, _, number in pairs}


def _blocks(value: Any) -> Any:
    """Checks `last:N`; makes a list of block indices of anything else, such as `0,1,2`."""
    if isinstance(value, str) and value.startswith("last:"):
        if not value[5:].isdecimal() or int(value[5:]) == 0:
            raise ValueError("expected last:N, such as last:4")
        return value
    return [value] if isinstance(value, int) else _split_commas(value)


def _trackers(value: Any) -> Any:
    """Splits names at commas; refuses the words that `Trainer` has for no tracker and for every installed one."""
    names = _split_commas(value)
    if isinstance(names, list) and ("none" in names or "all" in names):
        raise ValueError("TensorBoard is always written; name other trackers, or leave --report_to out")
    return names


def _interval(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Checks `epoch`, `no` or a number of updates; one message in place of one for each of them."""
    with suppress(ValidationError):
        return validate(value)
    raise ValueError("expected a number of updates, epoch or no")


def _resume(value: Any) -> Any:
    """Makes `auto`, or None, of the yes and no that `Trainer` takes."""
    return {"true": "auto", "yes": "auto", "false": None, "no": None}.get(str(value).lower(), value)


def _metric(value: Any) -> Any:
    """The name of a metric without the `eval_` that it has in `Trainer` and in results."""
    return value.removeprefix("eval_") if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_split_commas)]
Trackers = Annotated[
    list[Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]],
    BeforeValidator(_trackers),
]
Interval = Annotated[Annotated[int, Field(gt=0)] | Literal["epoch", "no"], WrapValidator(_interval)]
Resume = Annotated[str | None, BeforeValidator(_resume)]
Metric = Annotated[
    Literal["accuracy", "balanced_accuracy", "top5_accuracy", "mAP", "micro_f1", "macro_f1", "loss"],
    BeforeValidator(_metric),
]
Count = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
MaxPixels = Annotated[int, Field(ge=1_000)]
Probability = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Pattern = Annotated[dict[str, Count], BeforeValidator(_named_numbers)]
Blocks = Annotated[Annotated[list[NonNegativeInt], Field(min_length=1)] | str, BeforeValidator(_blocks)]


_COLORS: dict[str, tuple[int, int, int] | None] = {"black": (0, 0, 0), "white": (255, 255, 255), "ignore": None}


def color_of(text: str) -> tuple[int, int, int] | None:
    """Red, green and blue of `white`, `black` or `R,G,B`, None for `ignore`; raises `ValueError` for anything else."""
    if text in _COLORS:
        return _COLORS[text]
    parts = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if len(parts) != 3 or not all(0 <= part <= 255 for part in parts):
        raise ValueError("expected white, black, ignore or three numbers from 0 to 255 such as 128,128,128")
    return parts[0], parts[1], parts[2]


def color_name(color: tuple[int, int, int] | None) -> str:
    """The inverse of `color_of`: the text for a color."""
    return next((name for name, known in _COLORS.items() if known == color), ",".join(map(str, color or ())))


def _color(text: str) -> str:
    color_of(text)
    return text


def _ascending(limits: list[float]) -> list[float]:
    if len(limits) != 2 or not -math.inf < limits[0] < limits[1] < math.inf:
        raise ValueError("expected two ascending numbers, LOW HIGH")
    return limits


def _height_and_width(value: Any) -> Any:
    """Makes two numbers of one."""
    numbers = [value] if isinstance(value, int) else _split_commas(value)
    return numbers * 2 if isinstance(numbers, list) and len(numbers) == 1 else numbers


def fold_and_count(text: str) -> tuple[int, int]:
    """The two numbers of a fold such as `2/5`; raises `ValueError` for anything else."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) and int(count) > 1):
        raise ValueError("expected a fold and the number of folds, such as 2/5")
    return int(number), int(count)


def _fold(text: str) -> str:
    return "{}/{}".format(*fold_and_count(text))


Fold = Annotated[str, AfterValidator(_fold)]
Color = Annotated[str, AfterValidator(_color)]
PixelRange = Annotated[list[float], AfterValidator(_ascending)]
ImageSize = Annotated[list[Count], BeforeValidator(_height_and_width), Field(min_length=2, max_length=2)]


MAX_IMAGE_PIXELS = 178_956_970
"""Pillow's limit."""


class Contradiction(NamedTuple):
    """Settings that cannot be combined: their flat names, and a message that says how to resolve it."""

    names: tuple[str, ...]
    message: str


def missing_paths(
    train_dir: str | None,
    validation_dir: str | None,
    exclude: str | None,
    test_dir: str | None = None,
    labels_file: str | None = None,
) -> Iterator[Contradiction]:
    """Yields a contradiction for each input path that does not exist."""
    for name, path in {"train_dir": train_dir, "validation_dir": validation_dir, "test_dir": test_dir}.items():
        if path and not is_packaged(path):
            mode, why = _mode(path)
            if not stat.S_ISDIR(mode):
                yield Contradiction((name,), f"{why or 'no such directory'}: {path}")
    for name, path in {"exclude": exclude, "labels_file": labels_file}.items():
        if path:
            mode, why = _mode(path)
            if not stat.S_ISREG(mode):
                yield Contradiction((name,), f"{why or 'no such file'}: {path}")


def same_folders(train_dir: str | None, **others: str | None) -> Iterator[Contradiction]:
    """Yields a contradiction for each other folder, by the name of its setting, that is the training folder."""
    for name, folder in others.items():
        if train_dir and folder and os.path.realpath(folder) == os.path.realpath(train_dir):
            text = "the same folder: metrics on training images are too good; without this setting, some are held out"
            yield Contradiction((name, "train_dir"), text)


def inside_data(name: str, output: str | None, **folders: str | None) -> Iterator[Contradiction]:
    """Yields a contradiction for each folder of data, by the name of its setting, that the output would be inside.

    Hidden folders in it are no data.
    """
    if not output or _mode(output)[1]:
        return
    for other, folder in folders.items():
        if not folder or _mode(folder)[1]:
            continue
        way = Path(os.path.relpath(os.path.realpath(output), os.path.realpath(folder)))
        # From the folder to the output, by `..` if it is outside.
        if not any(part.startswith(".") for part in way.parts):
            yield Contradiction((name, other), f"{output} would become part of the data: use another directory")


def impossible_output(output_dir: str) -> Iterator[Contradiction]:
    """Yields a contradiction if `output_dir` is not a possible path."""
    _, why = _mode(output_dir)
    if why:
        yield Contradiction(("output_dir",), f"{why}: {output_dir}")


def _mode(path: str) -> tuple[int, str]:
    """`st_mode` of a path, 0 if it does not exist; and why it cannot be read, e.g. because its name is too long."""
    try:
        return Path(path).stat().st_mode, ""
    except (FileNotFoundError, NotADirectoryError):
        return 0, ""
    except (OSError, ValueError) as error:
        return 0, (isinstance(error, OSError) and error.strerror) or str(error)
