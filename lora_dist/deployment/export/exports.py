"""Writes the exports that the settings name: an adapter with old names, a merged model, an ONNX file."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_dist.deployment.export import merge, older_peft, onnx_export, onnx_model
from lora_dist.model.trained.classifier import Classifier, load_classifier
from lora_dist.settings.predict import PredictSettings
from lora_dist.storage.writable import writing

logger = logging.getLogger(__name__)


def write(
    classifier: Classifier, adapters: Mapping[str, Path], files: Sequence[str], settings: PredictSettings
) -> Classifier:
    """Writes the requested exports, and returns the classifier to use: the merged or ONNX model if one was written.

    Args:
        classifier: merged in place if it is exported as a whole model.
        adapters: directories of the adapters that it was made of, by name.
        files: images to compare logits on.
        settings: name the exports.

    Raises:
        UserError: an export cannot be written, or does not give the same logits.
    """
    merging, exporting, trusted = settings.merging, settings.exporting, settings.source.trust_remote_code
    if merging.export_legacy_names:
        out = Path(merging.export_legacy_names)
        card = older_peft.card_of(list(adapters.values()), settings.title, settings.source.adapter_scale != 1)
        pictures = older_peft.pictures_of(card, next(iter(adapters.values())))
        with writing(out, "export_legacy_names"):
            older_peft.export_legacy_names(classifier, card, out, files, trusted, pictures)
        logger.info("exported to %s, with the names of transformers 4", out)
    if merging.merge_to:
        out = Path(merging.merge_to)
        tolerance, dtype = merging.merge_tolerance, merging.dtype
        with writing(out, "merge_to"):
            merged = merge.merge_to(classifier, settings.title, out, files, tolerance, dtype, trusted)
        logger.info("merged into %s; its logits differ by %.1e, relative to the largest", out, merged.merge)
        if merged.rounding is not None:
            logger.info("with weights rounded to %s they differ by %.1e", dtype, merged.rounding)
        classifier = load_classifier(out, trust_remote_code=trusted)
    if settings.onnx_to_write:
        out = Path(settings.onnx_to_write)
        with writing(out, "onnx"):
            batch_size = settings.images.batch_size
            exported = onnx_export.export(classifier, out, files, exporting.int8, exporting.fp16, batch_size)
        what = ", before rounding," if exporting.int8 or exporting.fp16 else ""
        logger.info("wrote %s; its logits%s differ from PyTorch's by %.1e of the largest", out, what, exported.logits)
        if exported.fp16 is not None:
            logger.info("in fp16 they differ by %.1e", exported.fp16)
        if what:
            hint = "pass --images, best in class folders, to count the predictions that change"
            logger.info("%s", exported.cost or hint)
        classifier = onnx_model.load_onnx(out)
    return classifier
