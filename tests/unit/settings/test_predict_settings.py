"""What contradicts what on the prediction command line."""

from pathlib import Path

import pytest

from lora_dist.errors import UserError
from lora_dist.settings.cli import parse
from lora_dist.settings.predict import PredictSettings, contradictions


def _parse(line: str) -> PredictSettings:
    return parse(
        PredictSettings, line.split(), prog="predict", description="", contradictions=contradictions, takes_config=False
    )


@pytest.mark.parametrize(
    "line",
    [
        "--adapter a --images x",
        "--adapter a b --images x",
        "--adapter a b --weights 0.5 0.5 --merge_to m --onnx f --int8",
        "--adapter a b --weights 0.5 0.5 --serve",
        "--adapter a --onnx f --serve",
        "--adapter a --export_legacy_names e",
        "--model m --onnx f",
        "--model m --serve --device cuda --top_k 3 --batch_size 1 --port 0 --host h --max_files 1",
        "--adapter a --images x --output o --format csv --grid g --top_k 2 --batch_size 1 --num_workers 0 --device cpu",
        "--adapter a --merge_to m --dtype fp16 --merge_tolerance 1e-3",
        "--adapter a --merge_to m --serve --port 80",
        "--onnx f --images x --device cpu",
        "--onnx f --serve",
    ],
)
def test_what_fits_together_is_taken(line: str) -> None:
    _parse(line)


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("--adapter org/name@v1 --serve", "org/name@v1"),
        ("--adapter day=a --weights 1 --serve", "day"),
        ("--adapter day=a b --weights 0.7 0.3 --serve", "0.7 x day + 0.3 x b"),
        ("--model m --serve", "m"),
        ("--onnx f --serve", "f"),
    ],
)
def test_the_title_names_the_model(line: str, title: str) -> None:
    assert _parse(line).title == title


def test_an_adapter_has_the_name_that_is_given_or_that_of_its_directory(tmp_path: Path) -> None:
    odd = tmp_path / "r=16"
    odd.mkdir()
    source = _parse(f"--adapter day=a b {odd} --images x").source
    assert source.named_adapters == [("day", "a"), ("b", "b"), (str(odd), str(odd))]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--images x", "--adapter, --model, --onnx: give one of them"),
        ("--adapter a --model m --images x", "--adapter, --model: give one of them"),
        ("--adapter a b a --images x", "--adapter: a is there twice; write NAME=DIRECTORY"),
        ("--adapter a=x a=y --images x", "--adapter: a is there twice; write NAME=DIRECTORY"),
        ("--adapter a", "--images, --merge_to, --onnx, --serve: nothing to do"),
        ("--onnx f", "--images, --merge_to, --onnx, --serve: nothing to do"),
        ("--onnx f --images x --merge_to m", "--onnx, --merge_to: a whole model has nothing to merge"),
        ("--onnx f --images x --labels l", "--onnx, --labels: this belongs to an adapter"),
        ("--model m --images x --base_model b", "--model, --base_model: this belongs to an adapter"),
        ("--adapter a b --onnx f", "--adapter, --onnx: of several adapters, a blend is written"),
        ("--adapter a b --merge_to m", "--adapter, --merge_to: of several adapters, a blend is written"),
        ("--adapter a b --serve", "--adapter, --serve: of several adapters, a blend is served"),
        ("--adapter a b --images x --grid g", "--grid, --adapter: a grid shows the predictions of one adapter"),
        ("--adapter a b --images x --weights 1", "--weights, --adapter: 1 weights for 2 adapters"),
        ("--adapter a b --images x --weights 1 1", "--weights: they add up to 2 and not to 1"),
        ("--adapter a --images x --dtype bf16", "--dtype, --merge_to: nothing is merged"),
        ("--adapter a --images x --merge_tolerance 1e-4", "--merge_tolerance, --merge_to: nothing is merged"),
        ("--adapter a --serve --dtype bf16", "--dtype, --merge_to: nothing is merged"),
        ("--adapter a --merge_to m --output o", "--output, --images: no images are classified"),
        ("--adapter a --merge_to m --format csv", "--format, --images: no images are classified"),
        ("--adapter a --merge_to m --grid g", "--grid, --images: no images are classified"),
        ("--adapter a --onnx f --top_k 1", "--top_k, --images: no images are classified"),
        ("--adapter a --merge_to m --batch_size 8", "--batch_size, --images: no images are classified"),
        ("--adapter a --merge_to m --num_workers 0", "--num_workers, --images: no images are classified"),
        ("--adapter a --merge_to m --device cpu", "--device, --images: no images are classified"),
        ("--adapter a --images x --port 8000", "--port, --serve: nothing is served"),
        ("--adapter a --merge_to m --host h", "--host, --serve: nothing is served"),
        ("--model m --images x --max_upload_mb 1", "--max_upload_mb, --serve: nothing is served"),
        ("--onnx f --images x --max_megapixels 1", "--max_megapixels, --serve: nothing is served"),
        ("--adapter a --images x --max_files 1", "--max_files, --serve: nothing is served"),
        ("--adapter a --dtype bf16", "--images, --merge_to, --onnx, --serve: nothing to do"),
        ("--adapter a --images x --int8", "--int8, --onnx: a file is quantised when it is written"),
        ("--onnx f --images x --int8", "--int8, --onnx: a file is quantised when it is written"),
        ("--onnx f --images x --device cuda", "--onnx, --device: an ONNX file runs on the CPU"),
        ("--adapter a --serve --images x", "--serve, --images: a server takes its images from requests"),
        ("--adapter a --serve --output o", "--serve, --output: a server takes its images from requests"),
        (
            "--adapter a --serve --max_megapixels 179",
            "--max_megapixels: '179' is not valid: Input should be less than",
        ),
        ("--adapter a --serve --grid g", "--serve, --grid: a server takes its images from requests"),
        ("--adapter a --serve --format csv", "--serve, --format: a server takes its images from requests"),
        ("--adapter a --serve --num_workers 0", "--serve, --num_workers: a server takes its images from requests"),
        ("--onnx f --images x --trust_remote_code", "--onnx, --trust_remote_code: an ONNX file brings no code"),
    ],
)
def test_what_contradicts_is_told_alone_and_by_name(line: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        _parse(line)
    first, *problems = str(caught.value).splitlines()
    assert first == "1 problem with the settings of predict"
    assert problems[0].strip().startswith(words)
