"""The model card: base, data, metrics and usage."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lora_dist.metrics.intervals import with_interval
from lora_dist.metrics.slices import slice_rows
from lora_dist.model.license import License
from lora_dist.model.temperature import UNCALIBRATED, Calibration
from lora_dist.training.problem import ProblemType

MOST_CLASSES = 100
_KINDS = {"lora": "A LoRA adapter", "head": "A classification head", "full": "A model"}


def model_card(
    *,
    title: str,
    tuning: str,
    base_model: str,
    base_is_on_hub: bool,
    start: str | None,
    data: str,
    data_is_on_hub: bool,
    name_on_hub: str | None,
    problem: ProblemType,
    labels: Sequence[str],
    per_class: Sequence[Mapping[str, float]],
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    license_: License | None = None,
    calibration: Calibration = UNCALIBRATED,
    reliability: str | None = None,
) -> str:
    """Markdown with the Hub's metadata on top.

    Args:
        title: name of the run.
        tuning: "lora" or "head", for an adapter on `base_model`, or "full", for a whole model.
        base_model: name or path of the base.
        base_is_on_hub: whether `base_model` is a name on the Hub, which the card links to. The Hub refuses a card with
            a path.
        start: the adapter that training started from, if any.
        data: name or path of the data.
        data_is_on_hub: whether `data` is a name on the Hub.
        name_on_hub: name of the repository on the Hub that gets the card, if any.
        problem: what the model was trained for.
        labels: class names in order.
        per_class: metrics of each class.
        results: as in `all_results.json`.
        settings: flat, as used.
        license_: of the base.
        calibration: of the result.
        reliability: file name of the reliability diagram, if there is one.
    """
    is_adapter = tuning != "full"
    relation = {"base_model": base_model, "base_model_relation": "adapter" if is_adapter else "finetune"}
    metadata = {
        **(license_.metadata if license_ else {}),
        **(relation if base_is_on_hub else {}),
        **({"datasets": [data]} if data_is_on_hub else {}),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "lora_dist", *(["lora"] if tuning == "lora" else [])],
        "metrics": [problem.headline],
        "model-index": [
            {
                "name": title,
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": data, "type": data if data_is_on_hub else "imagefolder"},
                        "metrics": [{"type": problem.headline, "value": results[f"eval_{problem.headline}"]}],
                    }
                ],
            }
        ],
    }
    source = name_on_hub or "THIS_DIRECTORY"
    use = f"python -m lora_dist.predict --{'adapter' if is_adapter else 'model'} {source} --images photos/"
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {title}",
        "",
        f"{_KINDS[tuning]} for images of {len(labels)} {problem.labels_word}, "
        f"trained with lora_dist on {_code(data)} from {_code(base_model)}"
        f"{f', continued from the adapter {_code(start)}' if start else ''}.",
        "",
        "| | |",
        "|---|---|",
        *(
            f"| {name} | {with_interval(results[name], results.get(f'{name}_interval'))} |"
            for name in sorted(results)
            if _is_metric(name, results[name])
        ),
        f"| validation images | {results['eval_samples']:,} |",
        *([f"| test images | {results['test_samples']:,} |"] if "test_samples" in results else []),
        f"| training images | {results['train_samples']:,} |",
        f"| trainable parameters | {results['trainable_params']:,} of {results['all_params']:,} |",
        "",
        "## Use",
        "",
        f"    {use}",
        "",
        *(_merge_first(source) if is_adapter else []),
        *(license_.section() if license_ else []),
        *_calibration(results.get("calibration"), calibration, is_adapter, reliability),
        "## Classes",
        "",
        f"| class | {' | '.join(problem.class_columns.values())} |",
        f"|---|{'---|' * len(problem.class_columns)}",
        *(
            f"| {_cell(label)} | {' | '.join(_figure(row[name]) for name in problem.class_columns)} |"
            for label, row in list(zip(labels, per_class, strict=True))[:MOST_CLASSES]
        ),
        "",
        *([f"… and {len(labels) - MOST_CLASSES} more.", ""] if len(labels) > MOST_CLASSES else []),
        *_slices(results),
        "## Settings",
        "",
        "```yaml",
        yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "",
    ]
    return "\n".join(lines)


def _slices(results: Mapping[str, Any]) -> list[str]:
    """The metrics of each slice of --slice_columns."""
    lines = []
    for split, title in (("eval", "validation"), ("test", "test")):
        rows = list(slice_rows(results.get(f"{split}_slices", {})))
        if rows:
            names = ["column", "value", *rows[0].metrics, "images"]
            cells = ([row.column, row.value, *row.metrics.values(), row.images] for row in rows)
            lines += [f"## Slices of the {title} images", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
            lines += [*(f"| {' | '.join(map(_cell, row))} |" for row in cells), ""]
    return lines


def _calibration(
    report: Mapping[str, Any] | None, calibration: Calibration, is_adapter: bool, reliability: str | None
) -> list[str]:
    """A section on the temperature, its effect, and the effect of thresholds of confidence."""
    if report is None:
        return []
    if report["reason"] is not None:
        first = [f"The probabilities are not calibrated: {report['reason']}.", ""]
    else:
        first = [
            f"The logits are divided by the temperature {report['temperature']:.4g}, which was fitted on "
            f"{report['images']:,} validation images. {_effect(calibration, is_adapter)}",
            "",
            f"Measured on {report['measured_on']}:",
            "",
            "| | before | after |",
            "|---|---|---|",
            *(
                f"| {name} | {report[f'{key}_before']:.4f} | {report[f'{key}_after']:.4f} |"
                for name, key in (("calibration error", "calibration_error"), ("loss", "loss"))
            ),
            "",
        ]
    return [
        "## Calibration",
        "",
        *first,
        *([f"![Reliability diagram]({reliability})", ""] if reliability else []),
        "The effect of `--min_confidence` of `lora_dist.predict` on the validation images:",
        "",
        "| confidence at least | answered | accuracy of the answered |",
        "|---|---|---|",
        *(
            f"| {row['min_confidence']:g} | {row['answered']:.1%} | "
            f"{'' if row['accuracy'] is None else format(row['accuracy'], '.4f')} |"
            for row in report["coverage"]
        ),
        "",
    ]


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
