"""Settings of the prediction command: names, types, defaults, help texts and contradictions."""

import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lora_dist.demo import is_packaged
from lora_dist.errors import UserError
from lora_dist.settings.fields import (
    MAX_IMAGE_PIXELS,
    SEVERAL,
    Contradiction,
    Count,
    Group,
    MaxPixels,
    Names,
    NonNegative,
    NonNegativeInt,
    Positive,
)

Format = Literal["jsonl", "csv", "parquet"]
OutputType = Literal["top_k", "probabilities", "logits", "embeddings"]
_SUFFIXES: dict[str, Format] = {
    "": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}


def format_of(output: str | None, chosen: Format | None) -> Format:
    """The format of an output: the chosen one, or that of its suffix, or else JSON Lines."""
    return chosen or _SUFFIXES.get(_suffix(output), "jsonl")


def _suffix(output: str | None) -> str:
    return os.path.splitext(output or "")[1].lower()


class ModelSource(Group):
    """Model"""

    adapter: Annotated[Names, Field(json_schema_extra=SEVERAL)] = Field(default=[])
    """Adapter: a directory, e.g. runs/demo/adapter, a checkpoint of a finished run, or a Hub name (org/name or
    org/name@revision). Several adapters of one base model may be given, each optionally named: NAME=DIRECTORY."""
    weights: Annotated[list[float], Field(json_schema_extra=SEVERAL)] = Field(default=[])
    """Merge several adapters into one weighted sum: one weight per adapter, adding up to 1."""
    average: bool = False
    """Merge several adapters into one, with equal weights."""
    greedy_soup: str | None = None
    """Folder of images with one sub-folder per class. Merge, with equal weights, the adapters that are most accurate
    together: starting with the best, each is added if the accuracy on these images does not fall."""
    adapter_scale: NonNegative = 1.0
    """Factor of the LoRA update, after averaging. Modules trained in full, such as the head, keep their weights."""
    class_names: str | None = None
    """Text file of class names, one per line, for an adapter without a label map."""
    model: str | None = None
    """Full model, merged or trained with --tuning full: a directory or a Hub name."""
    base_model: str | None = None
    """Base model of the adapter: a Hub name or a directory. Default: the one that the adapter names."""
    trust_remote_code: bool = False
    """Run model code that comes with the model. Use only with sources that you trust."""

    @property
    def named_adapters(self) -> list[tuple[str, str]]:
        """Name and source of each adapter, from NAME=DIRECTORY; an unnamed adapter is named after its source."""
        named = []
        for word in self.adapter:
            name, equals, path = word.partition("=")
            named.append((name, path) if equals and not os.path.lexists(word) else (word, word))
        return named

    @property
    def side_by_side(self) -> bool:
        """Whether each of several adapters predicts separately."""
        return len(self.adapter) > 1 and not (self.weights or self.average or self.greedy_soup)

    def averaged_over(self, names: Collection[str]) -> "ModelSource":
        """Returns these settings with equal `weights` for the adapters of these names, and without the others."""
        adapters = [word for word, (name, _) in zip(self.adapter, self.named_adapters, strict=True) if name in names]
        weights = [1 / len(adapters)] * len(adapters)
        return self.model_copy(update={"adapter": adapters, "weights": weights, "average": False, "greedy_soup": None})


class Images(Group):
    """Images"""

    images: Annotated[Names, Field(json_schema_extra=SEVERAL)] = Field(default=[])
    """Files, folders and patterns such as 'photos/*.jpg'."""
    images_from: str | None = None
    """Text file with the paths of images, one per line."""
    top_k: Count | None = None
    """Number of classes per image, most likely first. Default: 1, or 5 with --serve."""
    min_confidence: Annotated[float, Field(gt=0, le=1)] | None = None
    """Label images 'unknown' whose highest probability is below this; their scores do not change. The model card lists
    the share and the accuracy of the images that remain at several thresholds."""
    output_type: OutputType = "top_k"
    """Further values of each image: the most likely classes, the probabilities or logits of all classes in the order of
    the label map, or embeddings, the pooled features that go into the head. Lists of numbers need JSON Lines or
    parquet."""
    output: str | None = None
    """File for the predictions. Default: print them."""
    format: Format | None = None
    """JSON Lines, CSV or parquet. Default: by the suffix of --output; JSON Lines without a suffix."""
    grid: str | None = None
    """PNG file for a grid of evenly spaced images with their predictions."""
    labels_file: str | None = None
    """Text file with the labels of the images in the folder of --images, as for lora_dist.train, to evaluate the
    predictions. Default: the names of the images' folders, if all of these are classes of the model."""
    label_column_name: str | None = None
    """Column of labels in --labels_file, or its columns of 0 and 1, such as cat,dog,bird."""
    group_column_name: str | None = None
    """Column of groups in --labels_file, such as patients. Intervals and tests resample whole groups."""
    compare_to: str | None = None
    """File of predictions for the same images, or the directory of a run: print which ones differ, and a paired test.
    With --grid: a grid of these images."""
    explain: str | None = None
    """Directory for a PNG file of each image with a heat map: the parts that speak for its predicted class."""
    batch_size: Count | None = None
    """Images per forward pass. Default: on a CPU 8 of 224 x 224, and up to 32 smaller ones; 128 on CUDA, else 32."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the forward pass: fp32, or autocast to bf16 or fp16. auto: bf16 on CUDA devices that compute in it,
    otherwise fp32."""
    num_workers: NonNegativeInt | None = None
    """Processes that decode images while the model runs. Default: 0 for few or tiny images; otherwise 1 on a CPU, and
    up to 16 on other devices, as cores and shared memory allow."""
    max_image_pixels: MaxPixels | None = None
    """Largest image to decode, in pixels. Default: Pillow's limit, 178,956,970."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps, ..."""


class DataSet(Group):
    """Images of a data set"""

    dataset_name: str | None = None
    """Data set instead of --images: a Hub name, a directory of parquet or WebDataset tar files, or one that
    `save_to_disk` wrote."""
    dataset_config_name: str | None = None
    """Configuration of the data set."""
    dataset_split: str | None = None
    """Split to classify, such as test or test[:1000]."""
    image_column_name: str | None = None
    """Column of images. Default: the only one of type Image. Without a data set: column of paths in --labels_file."""
    streaming: bool = False
    """Read parquet and tar files where they are, without a copy in the cache of `datasets`."""


class Merging(Group):
    """Merging and export"""

    merge_to: str | None = None
    """Directory for the base model with the adapter merged into it, as a plain transformers model."""
    merge_tolerance: Positive = 1e-4
    """Refuse to merge if the logits differ by more than this, relative to the largest logit."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Data type of the merged weights. Weights are merged in fp32 and then converted."""
    export_legacy_names: str | None = None
    """Directory for the adapter with the module names of transformers 4, for older releases of PEFT."""


class Exporting(Group):
    """ONNX (extra [onnx])"""

    onnx: str | None = None
    """ONNX file for ONNX Runtime on the CPU. With --adapter or --model: export the merged model, with labels and
    preprocessing in the metadata; fails if the logits on real images differ from PyTorch's by more than 1e-4 of the
    largest. Otherwise: predict with this file instead of PyTorch."""
    int8: bool = False
    """Quantize the linear layers of the file to 8 bits. With --images, reports how many predictions change, and the
    accuracy on folders that are named after classes."""
    fp16: bool = False
    """Write the file in fp16, half as large, with inputs and logits in fp32. Fails if the logits on real images differ
    by more than 5e-2 of the largest; reports as --int8 does."""


class Serving(Group):
    """Serving (extra [serve])"""

    serve: bool = False
    """Serve a web page for uploading images, and a JSON API; each of several adapters under its name."""
    host: str = "127.0.0.1"
    """Address to listen on. The default accepts only this machine. There is no password."""
    port: Annotated[int, Field(ge=0, lt=65536)] = 8000
    """Port to listen on. 0 selects a free one."""
    max_upload_mb: Positive = 20
    """Largest request, in megabytes."""
    max_megapixels: Positive = 50
    """Largest image of a request, in millions of pixels, within --max_image_pixels."""
    max_files: Count = 32
    """Largest number of images per request."""


FOR_FILES = (
    "images_from",
    "output_type",
    "output",
    "format",
    "grid",
    "explain",
    "precision",
    "num_workers",
    "labels_file",
    "label_column_name",
    "group_column_name",
    "compare_to",
)
"""Settings of `Images` that a server does not use."""


class PredictSettings(Group):
    """All settings of a prediction, by group."""

    source: ModelSource = ModelSource()
    images: Images = Images()
    data: DataSet = DataSet()
    merging: Merging = Merging()
    exporting: Exporting = Exporting()
    serving: Serving = Serving()

    @property
    def has_inputs(self) -> bool:
        """Whether there are images to classify."""
        return bool(self.images.images or self.images.images_from or self.data.dataset_name)

    @property
    def onnx_to_write(self) -> str | None:
        """The ONNX file to export; None if there is none, or if it is the model to run."""
        return self.exporting.onnx if self.source.adapter or self.source.model else None

    @property
    def title(self) -> str:
        """Display name of the model, with the weights of a sum and the scale of LoRA."""
        names = [name for name, _ in self.source.named_adapters]
        if self.source.side_by_side:
            return ", ".join(names)
        if len(names) > 1:
            title = " + ".join(f"{weight:g} x {name}" for weight, name in zip(self.source.weights, names, strict=True))
        else:
            title = names[0] if names else self.source.model or self.exporting.onnx or ""
        scale = self.source.adapter_scale
        return title if scale == 1 else f"{title}, LoRA scaled by {scale:g}"


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
    if images.format is None and _suffix(images.output) not in _SUFFIXES:
        text = f"{_suffix(images.output)} names no format: use .jsonl, .csv or .parquet, or set --format"
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


def _set(group: Group, *names: str) -> Iterator[str]:
    """The settings that the user set, even to the default."""
    return (name for name in names if name in group.model_fields_set)
