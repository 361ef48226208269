"""Settings of the prediction command: names, types, defaults and help texts."""

import os
from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field

from lora_dist.settings.fields import (
    Count,
    Group,
    MaxPixels,
    Names,
    NonNegative,
    NonNegativeInt,
    Positive,
    several,
)

Format = Literal["jsonl", "csv", "parquet"]
OutputType = Literal["top_k", "probabilities", "logits", "embeddings"]
SUFFIXES: dict[str, Format] = {
    "": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}


def format_of(output: str | None, chosen: Format | None) -> Format:
    """The format of an output: the chosen one, or that of its suffix, or else JSON Lines."""
    return chosen or SUFFIXES.get(suffix_of(output), "jsonl")


def suffix_of(output: str | None) -> str:
    """The suffix of an output in lower case, such as `.csv`; empty without one."""
    return os.path.splitext(output or "")[1].lower()


class ModelSource(Group):
    """Model"""

    adapter: Annotated[Names, Field(json_schema_extra=several("ADAPTER"))] = Field(default=[])
    """Adapter: a directory, e.g. runs/demo/adapter, a checkpoint of a finished run, or a Hub name (org/name or
    org/name@revision). Several adapters of one base model may be given, each optionally named: NAME=DIRECTORY."""
    weights: Annotated[list[float], Field(json_schema_extra=several("X"))] = Field(default=[])
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

    images: Annotated[Names, Field(json_schema_extra=several("FILE"))] = Field(default=[])
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
    """File for the predictions; an existing one is replaced. Default: print them."""
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
