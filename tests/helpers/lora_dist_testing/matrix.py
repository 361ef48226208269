"""Takes tiny checkpoints of every architecture through what users do with a model, and writes docs/models.md."""

import argparse
import logging
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.deployment.export.merge import merge_to
from lora_dist.deployment.export.onnx_export import export
from lora_dist.deployment.export.onnx_model import load_onnx
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import Base, load_base
from lora_dist.model.base.head import is_in
from lora_dist.model.lora.trainable import load_trained, make_trainable, set_training, trained_tensors
from lora_dist.model.trained.bundle import write_adapter, write_model
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.model.trained.parity import relative_difference
from lora_dist.settings.train import AugmentationSettings, LoraSettings, ModelSettings
from lora_dist_testing.architectures import TIMM, make_checkpoint
from lora_dist_testing.tiny import CLASSES, make_image, perturb, view_of

LABELS = list(CLASSES)
IMAGES = [make_image(label, number, (60, 50)) for label in range(3) for number in (0, 1)]
ALL = (*(name for name in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES if name != "timm_wrapper"), *TIMM)
PAGE = Path(__file__).parents[3] / "docs" / "models.md"
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"
TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest."""


@dataclass(frozen=True)
class Case:
    """A checkpoint, and a directory for what is made of it."""

    name: str
    directory: Path

    @cached_property
    def checkpoint(self) -> Path:
        return make_checkpoint(self.directory / "checkpoint", self.name)

    def base(self) -> Base:
        return load_base(str(self.checkpoint), LABELS)

    @cached_property
    def adapter(self) -> tuple[Path, Tensor]:
        """An adapter of LoRA after two updates, and its logits."""
        return _train(self, self.directory / "adapter", "lora")


def _train(case: Case, directory: Path, tuning: Literal["lora", "head", "full"], **lora: Any) -> tuple[Path, Tensor]:
    """Trains, requires that what should change does and nothing else, and writes the result and its logits."""
    base = case.base()
    model = make_trainable(base, ModelSettings(tuning=tuning), LoraSettings(lora_r=4, lora_dropout=0.1, **lora))
    perturb(model, scale=0.02)
    trained = {name for name, _ in trained_tensors(model)}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _updates(model, base)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values() if tensor.is_floating_point())
    # Weights that modules share are in `state_dict` under several names.
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])} & own
    assert changed <= trained, f"also changed: {sorted(changed - trained)[:3]}"
    assert any(".lora_B." in name for name in changed) == (tuning == "lora"), "LoRA did not change"
    assert changed, "nothing changed"
    expected = _logits(model, base)
    again = make_trainable(case.base(), ModelSettings(tuning=tuning), LoraSettings(lora_r=4, **lora))
    load_trained(again, dict(trained_tensors(model)))
    _require_close(_logits(again, base), expected, "after resuming")
    if tuning == "full":
        write_model(directory, base.model, base.processor, "card\n")
    else:
        write_adapter(directory, model, base, "card\n")
    loaded = load_classifier(directory)
    _require_close(_logits(loaded.model, loaded), expected, "after loading")
    return directory, expected


def _updates(model: nn.Module, base: Base) -> None:
    """Two updates on random crops; the last batch is of one image."""
    set_training(model)
    transforms = ImageTransforms(base.processor, AugmentationSettings())
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], 0.01)
    for rows in (range(3), range(3, 4)):
        pixels = torch.stack([view_of(transforms, IMAGES[row], (0, row)) for row in rows])
        logits = model(pixel_values=pixels).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([row % 3 for row in rows])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _logits(model: nn.Module, prepared_by: Any) -> Tensor:
    with torch.inference_mode():
        return model.eval()(pixel_values=ImageTransforms(prepared_by.processor).batch(IMAGES)).logits


def _require_close(actual: Tensor, expected: Tensor, when: str) -> None:
    difference = relative_difference(actual, expected)
    assert difference <= TOLERANCE, f"{when} the logits differ by {difference:.1e}"


def lora(case: Case) -> None:
    """LoRA with default targets: trains, resumes, predicts after loading."""
    assert case.adapter


def plain_peft(case: Case) -> None:
    """PEFT alone gives the same logits."""
    directory, expected = case.adapter
    model = AutoModelForImageClassification.from_pretrained(
        case.checkpoint, num_labels=3, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    _require_close(_logits(PeftModel.from_pretrained(model, str(directory)), case.base()), expected, "with plain PEFT")


def merged(case: Case) -> None:
    """The merged model loads in `pipeline` and gives the same probabilities."""
    directory, expected = case.adapter
    merge_to(load_classifier(directory), "x", case.directory / "merged", [], TOLERANCE)
    _require_same_in_pipeline(case.directory / "merged", expected)


def _require_same_in_pipeline(directory: Path, expected: Tensor) -> None:
    classify = pipeline("image-classification", str(directory))
    for image, row in zip(IMAGES, expected.softmax(-1), strict=True):
        found = {one["label"]: one["score"] for one in classify(image)}
        scores = torch.tensor([found[label] for label in LABELS])
        assert (scores - row).abs().max() < 1e-3, f"pipeline gives {found}"


def onnx(case: Case) -> None:
    """The ONNX file gives the same logits."""
    directory, expected = case.adapter
    export(load_classifier(directory), case.directory / "model.onnx", [])
    loaded = load_onnx(case.directory / "model.onnx")
    with torch.inference_mode():
        logits = loaded.model(pixel_values=ImageTransforms(loaded.processor).batch(IMAGES)).logits
    _require_close(logits, expected, "in ONNX")


def head(case: Case) -> None:
    """`--tuning head`."""
    _train(case, case.directory / "head", "head")


def full(case: Case) -> None:
    """`--tuning full`; the model loads in `pipeline`."""
    _require_same_in_pipeline(*_train(case, case.directory / "full", "full"))


def checkpointing(case: Case) -> None:
    """`--gradient_checkpointing` gives the same gradients."""
    gradients: list[dict[str, Tensor]] = []
    for recompute in (True, False):
        base = case.base()
        if not base.model.supports_gradient_checkpointing:
            raise NotImplementedError
        settings = ModelSettings(gradient_checkpointing=recompute)
        model = make_trainable(base, settings, LoraSettings(lora_r=4, lora_dropout=0))
        perturb(model)
        set_training(model)
        torch.manual_seed(0)
        model(pixel_values=ImageTransforms(base.processor).batch(IMAGES)).logits.pow(2).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    found, expected = gradients
    assert found.keys() == expected.keys(), "other parameters have gradients"
    for name in expected:
        difference = relative_difference(found[name], expected[name])
        assert difference <= 1e-3, f"the gradient of {name} differs by {difference:.1e}"


def all_linear(case: Case) -> None:
    """`--lora_target_modules all-linear`: trains, predicts after loading."""
    base = case.base()
    if not any(isinstance(one, nn.Linear) and not is_in(name, base.heads) for name, one in base.model.named_modules()):
        raise NotImplementedError
    _train(case, case.directory / "linear", "lora", lora_target_modules=["all-linear"])


STEPS: dict[str, Callable[[Case], None]] = {
    "LoRA": lora,
    "plain PEFT": plain_peft,
    "merge": merged,
    "ONNX": onnx,
    "head": head,
    "full": full,
    "gradient checkpointing": checkpointing,
    "all-linear": all_linear,
}


@dataclass(frozen=True)
class Outcome:
    """How a step ended: done, absent (the architecture has no such thing), refused (with a sentence) or failed."""

    kind: Literal["done", "absent", "refused", "failed"]
    text: str = ""


def outcomes(name: str, directory: Path, steps: Sequence[str] = tuple(STEPS)) -> dict[str, Outcome]:
    """Takes one architecture through the steps."""
    case = Case(name, directory)
    return {step: _outcome(STEPS[step], case) for step in steps}


def _outcome(step: Callable[[Case], None], case: Case) -> Outcome:
    try:
        step(case)
    except NotImplementedError:
        return Outcome("absent")
    except UserError as error:
        return Outcome("refused", str(error).replace(str(case.checkpoint), "CHECKPOINT"))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(
            "failed", f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
        )
    return Outcome("done")


MARKS = {"done": "✓", "absent": "-", "refused": "no", "failed": "FAILS"}


def row(name: str, found: Mapping[str, Outcome]) -> str:
    """The line of an architecture in the table of docs/models.md."""
    return f"| {name} | {' | '.join(MARKS[found[step].kind] for step in STEPS)} |"


def reasons(name: str, found: Mapping[str, Outcome]) -> list[str]:
    """One line for each sentence with which steps were refused or failed."""
    steps_of: dict[str, list[str]] = {}
    for step, outcome in found.items():
        if outcome.text:
            steps_of.setdefault(outcome.text, []).append(step)
    return [
        f"- {name}{'' if len(steps) == len(found) else ' (' + ', '.join(steps) + ')'}: {text}"
        for text, steps in steps_of.items()
    ]


def main() -> None:
    """Prints the outcomes of the named architectures; without names, writes those of all to docs/models.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names
    logging.disable(logging.WARNING)
    lines, texts = [], []
    for name in names or ALL:
        with tempfile.TemporaryDirectory() as directory:
            found = outcomes(name, Path(directory))
        lines.append(row(name, found))
        texts += reasons(name, found)
        print(lines[-1], *reasons(name, found), sep="\n", flush=True)
    if not names:
        header = ["| model type | " + " | ".join(STEPS) + " |", "|---" * (len(STEPS) + 1) + "|"]
        before, _, after = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        table = "\n".join([*header, *lines, "", "These are refused:", "", *texts])
        PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
