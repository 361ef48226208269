"""Settings of a sweep, in addition to those of the runs that it starts, and the ranges that it searches."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationError

from lora_dist.settings import train, train_contradictions
from lora_dist.settings.cli import did_you_mean, flat_fields
from lora_dist.settings.fields import Contradiction, Count, Group, several

_FIELDS = flat_fields(train.Settings)
_SEARCHED_GROUPS = {"model", "lora", "augmentation", "optimization"}
_SEARCHED = {name for name, field in _FIELDS.items() if field.group in _SEARCHED_GROUPS} - {"metric_for_best_model"}
_SEARCHED.add("balanced_sampling")
"""Settings whose trials are measured on the same images by the same metric."""
_RATES = ("learning_rate=log:2e-4..2e-2", "head_learning_rate=log:2e-4..2e-2", "weight_decay=0,0.01,0.1")
_DEFAULT = {
    "lora": (*_RATES, "lora_r=4,8,16,32", "lora_dropout=0..0.3"),
    "adapter": _RATES,
    "head": ("learning_rate=log:1e-4..1e-1", "weight_decay=0,0.01,0.1"),
    "full": ("learning_rate=log:5e-6..5e-4", "head_learning_rate=log:5e-5..1e-2", "weight_decay=0,0.01,0.1"),
}
"""Default ranges for each `--tuning`, and for an adapter to continue, whose LoRA settings are fixed."""


def _split_words(value: Any) -> Any:
    return value.split() if isinstance(value, str) else value


class SweepGroup(Group):
    """Sweep"""

    search: Annotated[list[str], BeforeValidator(_split_words)] = Field(
        default=[], json_schema_extra=several("NAME=RANGE")
    )
    """Training settings to search, separated by spaces: NAME=LOW..HIGH for a range, NAME=log:LOW..HIGH for a
    logarithmic range, or NAME=VALUE,VALUE for a choice. lora_alpha keeps its ratio to lora_r. Default: learning_rate,
    head_learning_rate, weight_decay, lora_r and lora_dropout."""
    trials: Count = 20
    """Number of training runs, with those that fail or are pruned."""
    workers: Count | None = None
    """Trials at a time. Default: one for each GPU, or one without a GPU. More trials than GPUs share the GPUs."""
    pruner: Literal["median", "none"] = "median"
    """median: stop a trial whose evaluations are all worse than the median of the complete trials at the same
    evaluation, from the second evaluation on and once five trials are complete. none: train every trial to its end."""


class SweepSettings(train.Settings):
    """All settings of a sweep, by group."""

    sweep: SweepGroup = SweepGroup()


class Axis(NamedTuple):
    """A setting that is searched: numbers from `low` to `high`, or one of `choices` as they stand on a command line."""

    name: str
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    @property
    def ends(self) -> tuple[float | str, ...]:
        """The choices, or both ends of the range."""
        return self.choices or (self.low, self.high)


def searched(settings: SweepSettings) -> list[str]:
    """Returns the given `--search`, or the default for the tuning."""
    kind = "adapter" if settings.model.adapter_name_or_path else settings.model.tuning
    return settings.sweep.search or list(_DEFAULT[kind])


def axes_of(settings: SweepSettings) -> list[Axis]:
    """Returns the axes of the search. Raises `ValueError` for the first one that is wrong."""
    axes = [_axis(text, settings) for text in searched(settings)]
    names = [axis.name for axis in axes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice} is there twice")
    return axes


def given_settings(settings: SweepSettings) -> dict[str, Any]:
    """The training settings that were given, by flat name as JSON values, without the output directory."""
    groups = settings.model_dump(mode="json", exclude_unset=True, exclude={"sweep"}).values()
    return {name: value for group in groups for name, value in group.items() if name != "output_dir"}


def with_values(settings: SweepSettings, values: Mapping[str, Any]) -> train.Settings:
    """Returns the training settings with some of them set. Raises `ValidationError` for invalid values."""
    given = settings.model_dump(exclude_unset=True, exclude={"sweep"})
    for name, value in values.items():
        given.setdefault(_FIELDS[name].group, {})[name] = value
    return train.Settings.model_validate(given)


def value_of(settings: train.Settings, name: str) -> Any:
    """Returns the value of a setting by its flat name. A head rate that is not set equals the learning rate."""
    value = getattr(getattr(settings, _FIELDS[name].group), name)
    if value is None and name == "head_learning_rate":
        return settings.with_default_learning_rate().optimization.learning_rate
    return value


def with_alpha(settings: SweepSettings, values: dict[str, Any]) -> dict[str, Any]:
    """Adds an alpha in the ratio to the rank that was given, so that another rank does not scale the update.

    Not with rsLoRA, whose scale is made for one alpha and any rank.
    """
    if "lora_r" not in values or "lora_alpha" in values or with_values(settings, values).lora.use_rslora:
        return values
    lora = settings.lora
    return values | {"lora_alpha": max(1, round(lora.lora_alpha * int(values["lora_r"]) / lora.lora_r))}


def as_given(settings: SweepSettings, axes: list[Axis]) -> dict[str, Any] | None:
    """Returns the values of the settings without a search, by axis; None if one of them is outside its axis."""
    found: dict[str, Any] = {}
    with_rate = settings.with_default_learning_rate()
    for axis in axes:
        value = value_of(with_rate, axis.name)
        if axis.choices:
            value = next((text for text in axis.choices if _validated(settings, axis.name, text) == value), None)
        elif not isinstance(value, int | float) or not axis.low <= value <= axis.high:
            value = None
        if value is None:
            return None
        found[axis.name] = value
    return found


def contradictions(settings: SweepSettings) -> Iterator[Contradiction]:
    """Yields every combination of settings that cannot work."""
    own = list(train_contradictions.contradictions(settings))
    yield from own
    for name, reason in {
        "do_eval_only": "a sweep trains: remove it",
        "dry_run": "a sweep trains: try its settings with lora_dist.train --dry_run",
        "resume_from_checkpoint": "the same command continues a sweep: remove it",
        "push_to_hub": "a sweep pushes nothing: train with its best.yaml and --push_to_hub",
    }.items():
        if getattr(settings.hub if name == "push_to_hub" else settings.run, name):
            yield Contradiction((name,), reason)
    if settings.run.eval_steps == "no" and settings.sweep.pruner != "none":
        yield Contradiction(("eval_steps", "pruner"), "nothing is evaluated to prune by: add --pruner none")
    try:
        axes = axes_of(settings)
    except ValueError as error:
        yield Contradiction(("search",), str(error))
        return
    for axis in axes:
        for value in axis.ends:
            for found in train_contradictions.contradictions(with_values(settings, {axis.name: value})):
                if found not in own:
                    yield Contradiction(("search", *found.names), f"with {axis.name} {value}: {found.message}")


def _axis(text: str, settings: SweepSettings) -> Axis:
    name, _, values = text.partition("=")
    name = name.replace("-", "_")
    if not values:
        raise ValueError(f"{text}: expected NAME=LOW..HIGH, NAME=log:LOW..HIGH or NAME=VALUE,VALUE")
    if name not in _FIELDS:
        raise ValueError(f"{name}: unknown setting{did_you_mean(name, _FIELDS)}")
    if name not in _SEARCHED:
        raise ValueError(f"{name} decides what is measured or written, which is the same in all trials")
    low, dots, high = values.removeprefix("log:").partition("..")
    kind = _FIELDS[name].number_type()
    if kind is None or not dots:
        choices = tuple(dict.fromkeys(value.strip() for value in values.split(",")))
        for choice in choices:
            _validated(settings, name, choice)
        return Axis(name, choices)
    ends = _validated(settings, name, low), _validated(settings, name, high)
    if not all(isinstance(end, int | float) for end in ends) or ends[0] >= ends[1]:
        raise ValueError(f"{text}: a range is two ascending numbers")
    log = values.startswith("log:")
    if log and ends[0] <= 0:
        raise ValueError(f"{text}: a logarithmic range begins above 0")
    return Axis(name, (), *ends, log)


def _validated(settings: SweepSettings, name: str, text: str) -> Any:
    try:
        return value_of(with_values(settings, {name: text}), name)
    except ValidationError as error:
        hint = "; a range is LOW..HIGH" if ":" in text else ""
        raise ValueError(f"{name}={text}: {error.errors()[0]['msg']}{hint}") from error
