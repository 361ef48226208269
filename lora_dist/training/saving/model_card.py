"""The model card: base, data, metrics and usage."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from lora_dist.metrics.intervals import with_interval
from lora_dist.metrics.slices import slice_rows
from lora_dist.model.base.license import License
from lora_dist.model.trained.temperature import UNCALIBRATED, Calibration
from lora_dist.training.problems.problem import ProblemType

MOST_CLASSES = 100
_KINDS = {"lora": "A LoRA adapter", "head": "A classification head", "full": "A model"}


class Reference(NamedTuple):
    """A model or a data set: its name on the Hub, which the card links to, or its path."""

    name: str
    is_on_hub: bool


@dataclass(frozen=True)
class ModelCard:
    """The content of a model card; `str` makes it Markdown with the Hub's metadata on top.

    Attributes:
        title: name of the run.
        tuning: "lora" or "head", for an adapter on `base`, or "full", for a whole model.
        base: the base model.
        data: the training data.
        problem: what the model was trained for.
        labels: class names in order.
        per_class: metrics of each class.
        results: as in `all_results.json`.
        settings: flat, as used.
        start: the adapter that training started from, if any.
        name_on_hub: name of the repository on the Hub that gets the card, if any.
        license_: of the base.
        calibration: of the result.
        reliability: file name of the reliability diagram, if there is one.
    """

    title: str
    tuning: str
    base: Reference
    data: Reference
    problem: ProblemType
    labels: Sequence[str]
    per_class: Sequence[Mapping[str, float]]
    results: Mapping[str, Any]
    settings: Mapping[str, Any]
    start: str | None = None
    name_on_hub: str | None = None
    license_: License | None = None
    calibration: Calibration = UNCALIBRATED
    reliability: str | None = None

    def __str__(self) -> str:
        sections = (
            self._metadata(),
            self._introduction(),
            self._metrics(),
            self._use(),
            self.license_.section() if self.license_ else (),
            self._calibration(),
            self._classes(),
            self._slices(),
            self._settings(),
        )
        return "\n".join(line for section in sections for line in section)

    @property
    def _is_adapter(self) -> bool:
        return self.tuning != "full"

    def _metadata(self) -> Iterator[str]:
        headline = self.problem.headline
        relation = {
            "base_model": self.base.name,
            "base_model_relation": "adapter" if self._is_adapter else "finetune",
        }
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": self.data.name, "type": self.data.name if self.data.is_on_hub else "imagefolder"},
            "metrics": [{"type": headline, "value": self.results[f"eval_{headline}"]}],
        }
        # The Hub refuses a card whose base model or data set is a path.
        metadata = {
            **(self.license_.metadata if self.license_ else {}),
            **(relation if self.base.is_on_hub else {}),
            **({"datasets": [self.data.name]} if self.data.is_on_hub else {}),
            "library_name": "peft" if self._is_adapter else "transformers",
            "pipeline_tag": "image-classification",
            "tags": ["image-classification", "lora_dist", *(["lora"] if self.tuning == "lora" else [])],
            "metrics": [headline],
            "model-index": [{"name": self.title, "results": [result]}],
        }
        yield from ("---", _yaml(metadata), "---", "")

    def _introduction(self) -> Iterator[str]:
        yield from (f"# {self.title}", "")
        start = f", continued from the adapter {_code(self.start)}" if self.start else ""
        yield (
            f"{_KINDS[self.tuning]} for images of {len(self.labels)} {self.problem.labels_word}, "
            f"trained with lora_dist on {_code(self.data.name)} from {_code(self.base.name)}{start}."
        )
        yield ""

    def _metrics(self) -> Iterator[str]:
        results = self.results
        yield from ("| | |", "|---|---|")
        for name in sorted(results):
            if _is_metric(name, results[name]):
                yield f"| {name} | {with_interval(results[name], results.get(f'{name}_interval'))} |"
        yield f"| validation images | {results['eval_samples']:,} |"
        if "test_samples" in results:
            yield f"| test images | {results['test_samples']:,} |"
        yield f"| training images | {results['train_samples']:,} |"
        yield f"| trainable parameters | {results['trainable_params']:,} of {results['all_params']:,} |"
        yield ""

    def _use(self) -> Iterator[str]:
        source = self.name_on_hub or "THIS_DIRECTORY"
        flag = "--adapter" if self._is_adapter else "--model"
        yield from ("## Use", "", f"    python -m lora_dist.predict {flag} {source} --images photos/", "")
        if self._is_adapter:
            yield from _merge_first(source)

    def _calibration(self) -> Iterator[str]:
        """The temperature and its effect, and the effect of thresholds of confidence."""
        report = self.results.get("calibration")
        if report is None:
            return
        yield from ("## Calibration", "")
        if report["reason"] is not None:
            yield from (f"The probabilities are not calibrated: {report['reason']}.", "")
        else:
            yield (
                f"The logits are divided by the temperature {report['temperature']:.4g}, which was fitted on "
                f"{report['images']:,} validation images. {_effect(self.calibration, self._is_adapter)}"
            )
            yield from ("", f"Measured on {report['measured_on']}:", "", "| | before | after |", "|---|---|---|")
            for name, key in (("calibration error", "calibration_error"), ("loss", "loss")):
                yield f"| {name} | {report[f'{key}_before']:.4f} | {report[f'{key}_after']:.4f} |"
            yield ""
        if self.reliability:
            yield from (f"![Reliability diagram]({self.reliability})", "")
        yield from ("The effect of `--min_confidence` of `lora_dist.predict` on the validation images:", "")
        yield from ("| confidence at least | answered | accuracy of the answered |", "|---|---|---|")
        for row in report["coverage"]:
            accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
            yield f"| {row['min_confidence']:g} | {row['answered']:.1%} | {accuracy} |"
        yield ""

    def _classes(self) -> Iterator[str]:
        columns = self.problem.class_columns
        yield from ("## Classes", "", f"| class | {' | '.join(columns.values())} |", f"|---|{'---|' * len(columns)}")
        for label, row in list(zip(self.labels, self.per_class, strict=True))[:MOST_CLASSES]:
            yield f"| {_cell(label)} | {' | '.join(_figure(row[name]) for name in columns)} |"
        yield ""
        if len(self.labels) > MOST_CLASSES:
            yield from (f"… and {len(self.labels) - MOST_CLASSES} more.", "")

    def _slices(self) -> Iterator[str]:
        """The metrics of each slice of --slice_columns."""
        for split, title in (("eval", "validation"), ("test", "test")):
            rows = list(slice_rows(self.results.get(f"{split}_slices", {})))
            if rows:
                names = ["column", "value", *rows[0].metrics, "images"]
                yield from (f"## Slices of the {title} images", "")
                yield from (f"| {' | '.join(names)} |", "|---" * len(names) + "|")
                for row in rows:
                    cells = [row.column, row.value, *row.metrics.values(), row.images]
                    yield f"| {' | '.join(map(_cell, cells))} |"
                yield ""

    def _settings(self) -> Iterator[str]:
        yield from ("## Settings", "", "```yaml", _yaml(dict(self.settings)), "```", "")
        yield "Versions: " + ", ".join(f"{name} {version}" for name, version in self.results["versions"].items())
        yield ""


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).rstrip()


def _merge_first(source: str) -> list[str]:
    """Lines on merging an adapter, because `pipeline` takes whole models."""
    return [
        "This is a PEFT adapter, not a whole model. `pipeline` and `AutoModelForImageClassification.from_pretrained` "
        "take the merged model; from the adapter alone they load the classes of the base, or raise an error:",
        "",
        f"    python -m lora_dist.predict --adapter {source} --merge_to merged/",
        '    pipeline("image-classification", model="merged/")',
        "",
    ]


def _effect(calibration: Calibration, is_adapter: bool) -> str:
    if calibration.folded != 1:
        return "The weights of the last layer include it, so the probabilities of any program are calibrated."
    ours = "`lora_dist` does so in predictions, its server, merged models and ONNX files."
    if is_adapter:
        return f"{ours} PEFT alone does not: its probabilities are not calibrated until the adapter is merged."
    return f"{ours} Other programs do not: their probabilities are not calibrated."


def _is_metric(name: str, value: Any) -> bool:
    is_measured = name.startswith(("eval_", "test_")) and not name.endswith("_samples")
    return is_measured and isinstance(value, float) and math.isfinite(value)


def _figure(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "" if math.isnan(value) else f"{value:.3f}"


def _code(text: str) -> str:
    return f"`{text}`"


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
