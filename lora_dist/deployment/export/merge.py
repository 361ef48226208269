"""Merges an adapter into its base, and checks that the result gives the same logits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from torch import nn

from lora_dist.deployment.destinations import require_free_directory
from lora_dist.deployment.export.checks import check_images, logits, require_same_after_loading
from lora_dist.errors import UserError
from lora_dist.model.base.license import License, license_of
from lora_dist.model.base.shared_weights import save_model
from lora_dist.model.lora import adapters
from lora_dist.model.trained import bundle
from lora_dist.model.trained.classifier import Classifier
from lora_dist.model.trained.parity import HALF_PRECISION_TOLERANCE, relative_difference
from lora_dist.model.trained.temperature import Calibration, fold
from lora_dist.storage.atomic import whole_directory

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Merged(NamedTuple):
    """Relative differences of logits from the adapter's: after merging in fp32, and after rounding the weights."""

    merge: float
    rounding: float | None = None


def merge_to(
    classifier: Classifier,
    source: str,
    out: Path,
    files: Sequence[str],
    tolerance: float,
    precision: Literal["fp32", "fp16", "bf16"] = "fp32",
    trust_remote_code: bool = False,
) -> Merged:
    """Writes the merged model as a `transformers` checkpoint with its processor and label map.

    The temperature becomes part of the head, so that any program computes calibrated probabilities.

    Args:
        classifier: with an adapter, which is merged in place.
        source: title of the adapter, for the model card.
        out: new or empty directory.
        files: images to compare logits on; packaged photographs if none is readable.
        tolerance: largest relative difference of logits; for half precision at least `HALF_PRECISION_TOLERANCE`.
        precision: of the written weights; merging is in fp32.
        trust_remote_code: run code that comes with the base.

    Raises:
        UserError: the logits differ by more, in memory or after loading, or `out` cannot be written.
    """
    require_free_directory(out, "merge_to")
    dtype = DTYPES[precision]
    transforms = classifier.transforms()
    images = check_images(files, transforms)
    pixels = transforms.batch(images)
    raw = logits(classifier.model, pixels)
    merged: Any = adapters.merge(classifier.model).eval()
    calibration = fold(merged, classifier.calibration)
    before = raw * (calibration.temperature / classifier.calibration.temperature)
    after = logits(merged, pixels)
    measured = Merged(relative_difference(after, before))
    if not measured.merge <= tolerance:
        raise UserError(
            f"the merged model differs from the adapter by {measured.merge:.1e}, more than --merge_tolerance "
            f"{tolerance:.1e}; nothing was written"
        )
    if dtype != torch.float32:
        after = logits(_round(merged, dtype), pixels)
        rounding, largest = relative_difference(after, before), max(tolerance, HALF_PRECISION_TOLERANCE)
        measured = Merged(measured.merge, rounding)
        if not rounding <= largest:
            raise UserError(
                f"in {precision} the merged model differs from the adapter by {rounding:.1e}, more than {largest:.1e}; "
                f"nothing was written. Leave --dtype out, or use the other half-precision type"
            )
    with whole_directory(out) as temporary:
        card = _card(source, measured, dtype, len(images), calibration, _license(classifier))
        save_model(merged.to(dtype), temporary)
        records = bundle.Records(classifier.conversion, calibration, classifier.decision)
        bundle.write_metadata(temporary, merged.config, classifier.processor, card, records)
        require_same_after_loading(temporary, out, "merge_to", images, after, trust_remote_code)
    return measured


def _round(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Rounds the weights to the values of a dtype, in place; the tensors stay fp32."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype))
    # Training mode drops what LeViT kept of its weights.
    return model.train().eval()


def _license(classifier: Classifier) -> License | None:
    base = classifier.base or {}
    name, revision = base.get("model_name_or_path"), base.get("revision")
    return license_of(name, revision, revision is not None) if name else None


def _card(
    source: str,
    measured: Merged,
    dtype: torch.dtype,
    images: int,
    calibration: Calibration,
    license_: License | None,
) -> str:
    metadata = yaml.safe_dump(license_.metadata, sort_keys=False, allow_unicode=True) if license_ else ""
    lines = [
        *(["---", metadata.rstrip(), "---", ""] if license_ else []),
        f"# {source}, merged",
        "",
        f"Merged into the base in fp32 by lora_dist. On {images} images the logits of the merged model differ from the "
        f"adapter's by {measured.merge:.1e}, relative to the largest.",
    ]
    if measured.rounding is not None:
        lines.append(
            f"The weights were rounded to {str(dtype).removeprefix('torch.')} last; computed in fp32 from these, the "
            f"logits differ by {measured.rounding:.1e}."
        )
    if calibration.folded != 1:
        lines.append(
            f"The weights of the last layer were divided by the temperature {calibration.folded:.4g}, so that "
            f"`pipeline` gives calibrated probabilities; the logits were compared after this division."
        )
    if calibration.temperature != 1:
        lines.append(
            f"The temperature {calibration.temperature:.4g} cannot become part of the head: `lora_dist` divides the "
            f"logits by it, and the probabilities of other programs are not calibrated."
        )
    lines += ["", '    pipeline("image-classification", model="THIS_DIRECTORY")', ""]
    return "\n".join([*lines, *(license_.section() if license_ else [])])
