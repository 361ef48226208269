"""Combinations of settings of a prediction that cannot work, and paths that do not exist."""

import glob
import math
import os
from collections.abc import Iterator
from pathlib import Path

from lora_dist.demo import is_packaged
from lora_dist.errors import UserError
from lora_dist.settings.fields import MAX_IMAGE_PIXELS, Contradiction, Group, inside_data
from lora_dist.settings.predict import FOR_FILES, SUFFIXES, PredictSettings, format_of, suffix_of


def require_shareable(settings: PredictSettings) -> None:
    """Raises a `UserError` unless several processes can share the work: images that are classified into a file."""
    merging = settings.merging
    alone = {
        "serve": settings.serving.serve,
        "merge_to": merging.merge_to,
        "export_legacy_names": merging.export_legacy_names,
        "onnx": settings.onnx_to_write,
        "greedy_soup": settings.source.greedy_soup,
    }
    for name in (name for name, value in alone.items() if value):
        raise UserError(f"--{name} needs one process: use `python -m lora_dist.predict` without a launcher")
    if not settings.images.output:
        raise UserError("several processes write their rows into one file: set --output")


def contradictions(settings: PredictSettings) -> Iterator[Contradiction]:
    """Yields every combination of settings that cannot work."""
    yield from _model_problems(settings)
    yield from _task_problems(settings)
    yield from _input_problems(settings)
    yield from _output_problems(settings)


def missing_paths(settings: PredictSettings) -> Iterator[Contradiction]:
    """Yields settings that name a path that does not exist."""
    source, images, onnx = settings.source, settings.images, settings.exporting.onnx
    models = [("adapter", path) for _, path in source.named_adapters]
    models += [(name, path) for name in ("model", "base_model") if (path := getattr(source, name))]
    for name, path in models:
        # A path with one slash may be a name on the Hub, such as org/name@refs/pr/1.
        is_path = path.startswith((".", "/", "~")) or path.partition("@")[0].count("/") > 1
        if is_path and not os.path.lexists(path):
            yield Contradiction((name,), f"no such directory: {path}")
    for path in images.images:
        if not (is_packaged(path) or glob.has_magic(path) or os.path.lexists(path)):
            yield Contradiction(("images",), f"no such file or directory: {path}")
    for name, path in (("images_from", images.images_from), ("labels_file", images.labels_file)):
        if path and not os.path.lexists(path):
            yield Contradiction((name,), f"no such file: {path}")
    if onnx and not settings.onnx_to_write and not os.path.lexists(onnx):
        yield Contradiction(("onnx",), f"no such file: {onnx}; pass an --adapter or --model to write it")


def _model_problems(settings: PredictSettings) -> Iterator[Contradiction]:
    source, merging, onnx = settings.source, settings.merging, settings.exporting.onnx
    if source.adapter and source.model:
        yield Contradiction(("adapter", "model"), "use only one of them")
    if not (source.adapter or source.model or onnx):
        yield Contradiction(("adapter", "model", "onnx"), "no model: set one of them")
    if not source.adapter and (source.model or onnx):
        full = "model" if source.model else "onnx"
        for name in ("merge_to", "export_legacy_names"):
            if getattr(merging, name):
                yield Contradiction((full, name), "only adapters can be merged or converted: use --adapter")
        for name in _set(source, "base_model", "class_names", "weights", "average", "greedy_soup", "adapter_scale"):
            yield Contradiction((full, name), f"--{name} needs an adapter: use --adapter")
    if source.trust_remote_code and not (source.adapter or source.model):
        yield Contradiction(("onnx", "trust_remote_code"), "ONNX files contain no code: remove --trust_remote_code")
    names = [name for name, _ in source.named_adapters]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield Contradiction(("adapter",), f"two adapters are named {name}: use NAME=DIRECTORY")
    if source.weights and source.adapter and len(source.weights) != len(source.adapter):
        yield Contradiction(("weights", "adapter"), f"{len(source.weights)} weights for {len(source.adapter)} adapters")
    if source.weights and not math.isclose(sum(source.weights), 1, abs_tol=1e-6):
        yield Contradiction(("weights",), f"the weights add up to {sum(source.weights):g} instead of 1")
    ways = [name for name in ("weights", "average", "greedy_soup") if getattr(source, name)]
    if len(ways) > 1:
        yield Contradiction(tuple(ways), "several ways to merge adapters: use only one of them")
    for name in ways:
        if len(source.adapter) == 1 and name != "weights":
            yield Contradiction((name, "adapter"), f"--{name} needs several adapters")
    if source.greedy_soup and not is_packaged(source.greedy_soup) and not Path(source.greedy_soup).is_dir():
        yield Contradiction(("greedy_soup",), f"no such directory: {source.greedy_soup}")
    if source.side_by_side:
        single = {"merge_to": merging.merge_to, "export_legacy_names": merging.export_legacy_names, "onnx": onnx}
        for name in (name for name, value in single.items() if value):
            yield Contradiction(
                ("adapter", name), f"--{name} needs one model: merge the adapters with --average or --weights"
            )
        if settings.images.grid:
            yield Contradiction(("grid", "adapter"), "--grid shows the predictions of one adapter")
        if settings.images.compare_to:
            yield Contradiction(("compare_to", "adapter"), "--compare_to compares the predictions of one adapter")
        if settings.images.explain:
            yield Contradiction(("explain", "adapter"), "--explain shows the predictions of one adapter")


def _task_problems(settings: PredictSettings) -> Iterator[Contradiction]:
    images, merging, exporting = settings.images, settings.merging, settings.exporting
    for name in ("int8", "fp16"):
        if getattr(exporting, name) and not settings.onnx_to_write:
            yield Contradiction((name, "onnx"), f"--{name} applies to an export: set --onnx, and --adapter or --model")
    if exporting.int8 and exporting.fp16:
        yield Contradiction(("int8", "fp16"), "use only one of them")
    if exporting.onnx and images.explain:
        yield Contradiction(("onnx", "explain"), "ONNX files cannot be explained: remove one of them")
    if exporting.onnx and images.device not in ("auto", "cpu"):
        yield Contradiction(("onnx", "device"), "ONNX files run on the CPU: remove --device")
    if exporting.onnx and images.precision not in ("auto", "fp32"):
        yield Contradiction(("onnx", "precision"), "ONNX files run in their own precision: remove --precision")
    if exporting.onnx and images.output_type == "embeddings":
        yield Contradiction(("onnx", "output_type"), "ONNX files give logits only: use the adapter or the merged model")
    if settings.serving.max_megapixels * 1e6 > (images.max_image_pixels or MAX_IMAGE_PIXELS):
        yield Contradiction(
            ("max_megapixels", "max_image_pixels"), "no image can be that large: raise --max_image_pixels"
        )
    if settings.serving.serve:
        for name in _set(images, "images", *FOR_FILES):
            yield Contradiction(("serve", name), f"the server does not use --{name}: remove one of them")
        if settings.data.dataset_name:
            yield Contradiction(("serve", "dataset_name"), "the server does not use --dataset_name: remove one of them")
    elif not (settings.has_inputs or merging.merge_to or merging.export_legacy_names or settings.onnx_to_write):
        yield Contradiction(("images", "merge_to", "onnx", "serve"), "nothing to do: set at least one of them")
        return
    elif not settings.has_inputs:
        for name in _set(images, *FOR_FILES, "top_k", "min_confidence", "batch_size", "device"):
            yield Contradiction((name, "images"), f"--{name} needs --images")
    if images.compare_to and settings.data.dataset_name:
        yield Contradiction(
            ("compare_to", "dataset_name"), "only predictions for files are compared: remove one of them"
        )
    if images.labels_file and len(images.images) != 1:
        yield Contradiction(
            ("labels_file", "images"), "the labels are for the images of a folder: set --images to this folder alone"
        )
    if not merging.merge_to:
        for name in _set(merging, "merge_tolerance", "dtype"):
            yield Contradiction((name, "merge_to"), f"--{name} needs --merge_to")
    if not settings.serving.serve:
        for name in _set(settings.serving, "host", "port", "max_upload_mb", "max_megapixels", "max_files"):
            yield Contradiction((name, "serve"), f"--{name} needs --serve")


def _input_problems(settings: PredictSettings) -> Iterator[Contradiction]:
    data, images = settings.data, settings.images
    for name in () if images.labels_file else _set(images, "label_column_name", "group_column_name"):
        yield Contradiction((name, "labels_file"), f"--{name} is a column of --labels_file: set it as well")
    if not data.dataset_name:
        of_data = ["dataset_config_name", "dataset_split", "streaming"]
        for name in _set(data, *of_data, *([] if images.labels_file else ["image_column_name"])):
            yield Contradiction((name, "dataset_name"), f"--{name} needs --dataset_name")
        return
    if not data.dataset_split:
        yield Contradiction(("dataset_name", "dataset_split"), "no split: set --dataset_split, e.g. test")
    elif data.streaming and not data.dataset_split.isidentifier():
        yield Contradiction(
            ("streaming", "dataset_split"), "streams do not support slices or sums: set one whole split"
        )
    for name in _set(images, "images", "images_from"):
        yield Contradiction((name, "dataset_name"), "files or a data set: use only one of them")
    merging = settings.merging
    exports = {"merge_to": merging.merge_to, "export_legacy_names": merging.export_legacy_names}
    for name in (name for name, value in (exports | {"onnx": settings.onnx_to_write}).items() if value):
        yield Contradiction((name, "dataset_name"), f"--{name} compares logits on files: use --images, or none")


def _output_problems(settings: PredictSettings) -> Iterator[Contradiction]:
    images = settings.images
    chosen = format_of(images.output, images.format)
    if images.format is None and suffix_of(images.output) not in SUFFIXES:
        text = f"{suffix_of(images.output)} names no format: use .jsonl, .csv or .parquet, or set --format"
        yield Contradiction(("output", "format"), text)
    if chosen == "parquet" and not images.output:
        yield Contradiction(("format", "output"), "parquet cannot be printed: set --output")
    if images.output_type != "top_k":
        if chosen == "csv":
            yield Contradiction(("output_type", "format"), "CSV has no lists of numbers: use a .jsonl or .parquet file")
        for name in _set(images, "top_k"):
            yield Contradiction(
                (name, "output_type"), f"--output_type {images.output_type} has all values: remove --top_k"
            )
    written = {"output": images.output, "grid": images.grid, "onnx": settings.onnx_to_write}
    read = {name: getattr(images, name) for name in ("images_from", "labels_file", "compare_to")}
    read["class_names"] = settings.source.class_names
    for name, output in written.items():
        for other, file in read.items():
            if output and file and Path(file).is_file() and os.path.realpath(output) == os.path.realpath(file):
                yield Contradiction((name, other), f"{file} would be replaced: choose another file to write")
    if settings.data.dataset_name and Path(settings.data.dataset_name).is_dir():
        yield from inside_data("output", images.output, dataset_name=settings.data.dataset_name)


def _set(group: Group, *names: str) -> Iterator[str]:
    """The settings that the user set, even to the default."""
    return (name for name in names if name in group.model_fields_set)
