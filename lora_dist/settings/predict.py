"""Settings of the prediction command, their help, and what contradicts what."""

import math
import os
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lora_dist.settings.cli import SEVERAL
from lora_dist.settings.train import Count, Group, Names, Positive, Problem


class ModelSource(Group):
    """Model"""

    adapter: Annotated[Names, Field(json_schema_extra=SEVERAL)] = Field(default=[])
    """Directory of an adapter, such as runs/demo/adapter, or its name on the Hub: org/name or org/name@revision. Or
    several on one base, plain or as NAME=DIRECTORY."""
    weights: Annotated[list[float], Field(json_schema_extra=SEVERAL)] = Field(default=[])
    """Blend several adapters into one: a weight for each, together 1."""
    labels: str | None = None
    """Text file of class names, one a line, for adapters from elsewhere that have no label map."""
    model: str | None = None
    """Directory of a whole model, merged or trained with --tuning full; or its name on the Hub."""
    base_model: str | None = None
    """Where the adapter's base model is now, if not where it was."""
    trust_remote_code: bool = False
    """Run model code that comes with the model. Only for sources you trust."""

    @property
    def named_adapters(self) -> list[tuple[str, str]]:
        """Name and place of each adapter: of NAME=DIRECTORY, or of a place that is its own name."""
        named = []
        for word in self.adapter:
            name, equals, path = word.partition("=")
            named.append((name, path) if equals and not os.path.lexists(word) else (word, word))
        return named

    @property
    def side_by_side(self) -> bool:
        """Whether there are several adapters, each for itself."""
        return len(self.adapter) > 1 and not self.weights


class Images(Group):
    """Images"""

    images: Annotated[Names, Field(json_schema_extra=SEVERAL)] = Field(default=[])
    """Files, folders and patterns such as 'photos/*.jpg'."""
    top_k: Count | None = None
    """Classes to name for each image, most likely first: 1 unless given, and 5 with --serve."""
    output: str | None = None
    """File for the predictions; without it they are printed."""
    format: Literal["jsonl", "csv"] | None = None
    """JSON lines or CSV; by default what the name of --output says."""
    grid: str | None = None
    """Also draw some of the images, spread evenly, with their predictions into this PNG file."""
    batch_size: Count | None = None
    """Images in a forward pass: 32 unless given, and 8 on a CPU, whose caches hold no more."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that decode images while the model runs: one unless given, and none for a few or for tiny files."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps …"""


class Merging(Group):
    """Merging and export"""

    merge_to: str | None = None
    """Write the base with the adapter merged into it, as a plain transformers model, to this directory."""
    merge_tolerance: Positive = 1e-4
    """Refuse a merge whose logits differ by more than this, relative to the largest."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the merged weights: they are merged in fp32 and rounded last."""
    export_legacy_names: str | None = None
    """Write the adapter in the names that transformers 4 and its PEFT read, to this directory."""


class Exporting(Group):
    """ONNX (extra [onnx])"""

    onnx: str | None = None
    """A model in one file, for ONNX Runtime on the CPU. With --adapter or --model it is written, merged, with labels
    and preprocessing in its metadata, unless its logits on real images differ from PyTorch's by more than 1e-4 of the
    largest. Without either it is read and run, instead of torch's model."""
    int8: bool = False
    """Quantise the linear layers of the file to 8 bits. What that costs is counted on --images: how many get another
    class, and the accuracy of those in folders named as the classes."""


class Serving(Group):
    """Serving (extra [serve])"""

    serve: bool = False
    """Serve a page to drop images on, and the same as JSON."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is for this machine alone. There is no password."""
    port: Annotated[int, Field(ge=0, lt=65536)] = 8000
    """Port to listen on; 0 takes a free one."""
    max_upload_mb: Positive = 20
    """Largest request, in megabytes."""
    max_megapixels: Annotated[float, Field(gt=0, le=178)] = 50
    """Largest image, in millions of pixels, whatever its file holds; at most 178, beyond which Pillow opens none."""
    max_files: Count = 32
    """Most images in a request."""


FOR_FILES = ("output", "format", "grid", "num_workers")
"""Settings of --images that a server has no use for."""


class PredictSettings(Group):
    """Settings of a prediction, by group."""

    source: ModelSource = ModelSource()
    images: Images = Images()
    merging: Merging = Merging()
    exporting: Exporting = Exporting()
    serving: Serving = Serving()

    @property
    def onnx_to_write(self) -> str | None:
        """The ONNX file, where there is a model to write into it; else it is there, and is run."""
        return self.exporting.onnx if self.source.adapter or self.source.model else None

    @property
    def title(self) -> str:
        """The one model in words: as the user called it, and a blend with its weights."""
        names = [name for name, _ in self.source.named_adapters]
        if len(names) > 1:
            return " + ".join(f"{weight:g} x {name}" for weight, name in zip(self.source.weights, names, strict=True))
        return names[0] if names else self.source.model or self.exporting.onnx or ""


def contradictions(settings: PredictSettings) -> Iterator[Problem]:
    """Yields every combination of settings that cannot work."""
    yield from _about_the_model(settings)
    yield from _about_the_work(settings)


def _about_the_model(settings: PredictSettings) -> Iterator[Problem]:
    source, merging, onnx = settings.source, settings.merging, settings.exporting.onnx
    if source.adapter and source.model:
        yield Problem(("adapter", "model"), "give one of them")
    if not (source.adapter or source.model or onnx):
        yield Problem(("adapter", "model", "onnx"), "give one of them")
    if not source.adapter and (source.model or onnx):
        whole = "model" if source.model else "onnx"
        for name in ("merge_to", "export_legacy_names"):
            if getattr(merging, name):
                yield Problem((whole, name), "a whole model has nothing to merge or export: give an --adapter")
        for name in ("base_model", "labels", "weights"):
            if getattr(source, name):
                yield Problem((whole, name), "this belongs to an adapter: give an --adapter")
    if source.trust_remote_code and not (source.adapter or source.model):
        yield Problem(("onnx", "trust_remote_code"), "an ONNX file brings no code to run: leave the second out")
    names = [name for name, _ in source.named_adapters]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield Problem(("adapter",), f"{name} is there twice; write NAME=DIRECTORY")
    if source.weights and source.adapter and len(source.weights) != len(source.adapter):
        yield Problem(("weights", "adapter"), f"{len(source.weights)} weights for {len(source.adapter)} adapters")
    if source.weights and not math.isclose(sum(source.weights), 1, abs_tol=1e-6):
        yield Problem(("weights",), f"they add up to {sum(source.weights):g} and not to 1")
    if source.side_by_side:
        written = {"merge_to": merging.merge_to, "export_legacy_names": merging.export_legacy_names, "onnx": onnx}
        for name in (name for name, value in written.items() if value):
            yield Problem(("adapter", name), "of several adapters, a blend is written: give --weights")
        if settings.serving.serve:
            yield Problem(("adapter", "serve"), "of several adapters, a blend is served: give --weights")
        if settings.images.grid:
            yield Problem(("grid", "adapter"), "a grid shows the predictions of one adapter")


def _about_the_work(settings: PredictSettings) -> Iterator[Problem]:
    images, merging, exporting = settings.images, settings.merging, settings.exporting
    if exporting.int8 and not settings.onnx_to_write:
        yield Problem(("int8", "onnx"), "a file is quantised when it is written: give it, and an --adapter or --model")
    if exporting.onnx and images.device not in ("auto", "cpu"):
        yield Problem(("onnx", "device"), "an ONNX file runs on the CPU: leave --device out")
    if settings.serving.serve:
        for name in _given(images, "images", *FOR_FILES):
            yield Problem(("serve", name), "a server takes its images from requests")
    elif not (images.images or merging.merge_to or merging.export_legacy_names or settings.onnx_to_write):
        yield Problem(
            ("images", "merge_to", "onnx", "serve"),
            "nothing to do: give images to classify, a directory to merge to, a file to export to, or serve",
        )
        return
    elif not images.images:
        for name in _given(images, *FOR_FILES, "top_k", "batch_size", "device"):
            yield Problem((name, "images"), "no images are classified: give the second as well, or neither")
    if not merging.merge_to:
        for name in _given(merging, "merge_tolerance", "dtype"):
            yield Problem((name, "merge_to"), "nothing is merged: give the second as well, or neither")
    if not settings.serving.serve:
        for name in _given(settings.serving, "host", "port", "max_upload_mb", "max_megapixels", "max_files"):
            yield Problem((name, "serve"), "nothing is served: give the second as well, or neither")


def _given(group: Group, *names: str) -> Iterator[str]:
    """Those of these settings that the user gave, even if as their defaults."""
    return (name for name in names if name in group.model_fields_set)
