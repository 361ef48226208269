"""Classifies images with a model, and merges, exports or serves it: `python -m lora_dist.predict --adapter DIR …`.

One process needs no launcher. Several processes, as of `accelerate launch`, share the images.
"""

from __future__ import annotations

import os
import sys
from itertools import chain
from typing import TYPE_CHECKING

from lora_dist.deployment import destinations
from lora_dist.errors import UserError
from lora_dist.processes.failure import report_failure
from lora_dist.processes.huge_pages import restart_with_huge_pages
from lora_dist.processes.lifetime import exit_on_user_error, run_command
from lora_dist.processes.parent_death import end_with_launcher
from lora_dist.settings.cli import argv_or, parse
from lora_dist.settings.predict import PredictSettings
from lora_dist.settings.predict_contradictions import contradictions, missing_paths, require_shareable

if TYPE_CHECKING:
    import torch

    from lora_dist.model.trained.adapter_set import AdapterSet

EXIT_BAD_IMAGES = 1


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Merges, exports, classifies or serves; exits with code 1 if an image cannot be read."""
    end_with_launcher()
    with report_failure():
        predict(argv)


def predict(argv: list[str] | None) -> None:
    """Reads the settings, and merges, exports, serves or classifies as they say."""
    settings = parse(
        PredictSettings,
        argv_or(argv),
        prog="lora_dist.predict",
        description="Classify images with an adapter or a model; merge an adapter, export to ONNX, or serve.",
        contradictions=lambda read: chain(contradictions(read), missing_paths(read)),
        takes_config=False,
    )
    is_shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if is_shared:
        require_shareable(settings)
    if __name__ == "__main__":
        restart_with_huge_pages()
    # Settings errors are reported before torch is imported, and so are outputs that cannot be written.
    destinations.require_destinations(settings)
    from lora_dist import extras, logs
    from lora_dist.data.pixels.limits import allow_pixels
    from lora_dist.deployment import classify, evaluate, loading
    from lora_dist.deployment.export import exports, onnx_export
    from lora_dist.deployment.inputs import files_of, find_inputs
    from lora_dist.deployment.prediction import classify_and_write
    from lora_dist.model.trained.adapter_set import AdapterSet
    from lora_dist.processes.threads import share_cores

    logs.set_up_logs(is_main=os.environ.get("RANK", "0") == "0")
    allow_pixels(settings.images.max_image_pixels)
    if settings.serving.serve:
        extras.require("serve", "--serve", "fastapi", "uvicorn", "python_multipart")
    if settings.onnx_to_write:
        onnx_export.require_packages()
    device = classify.choose_device("cpu" if settings.exporting.onnx else settings.images.device)
    if device.type == "cpu":
        share_cores()
    inference = classify.Inference(
        device,
        settings.images.batch_size,
        settings.images.num_workers,
        classify.choose_precision(settings.images.precision, device),
    )
    inputs = find_inputs(settings)
    other = evaluate.read_other_predictions(settings.images)
    settings, adapters = loading.choose_adapters(settings, device)
    models = loading.load(settings, adapters)
    if models.multi_label:
        _require_single_label(settings)
    reference = evaluate.Reference(evaluate.read_labels(settings, models.multi_label), other)
    models = AdapterSet(
        {name: exports.write(one, adapters, files_of(inputs), settings) for name, one in models.classifiers.items()}
    )
    if settings.serving.serve:
        _serve(models, settings, device)
    elif len(inputs) and not classify_and_write(models, adapters, inputs, reference, settings, inference, is_shared):
        sys.exit(EXIT_BAD_IMAGES)


def _require_single_label(settings: PredictSettings) -> None:
    """Raises `UserError` for settings that a model of several labels per image cannot have."""
    if settings.images.min_confidence is not None:
        raise UserError(
            "--min_confidence is for models of one class per image. This one has several labels, each with a threshold "
            "of its own: edit thresholds.json of the adapter or model"
        )


def _serve(models: AdapterSet, settings: PredictSettings, device: torch.device) -> None:
    from lora_dist.deployment.serve import server
    from lora_dist.deployment.serve.request_limits import Limits

    serving = settings.serving
    limits = Limits(
        body=int(serving.max_upload_mb * 1e6), pixels=int(serving.max_megapixels * 1e6), files=serving.max_files
    )
    app = server.make_app(
        models,
        settings.title,
        limits,
        top_k=settings.images.top_k or 5,
        min_confidence=settings.images.min_confidence,
        batch_size=settings.images.batch_size,
        device=device,
    )
    server.run(app, serving.host, serving.port)


if __name__ == "__main__":
    run_command(main)
