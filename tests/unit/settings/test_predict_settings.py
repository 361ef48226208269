"""Settings of the prediction command: which combinations are accepted, and which are refused."""

from pathlib import Path

import pytest

from lora_dist.errors import UserError
from lora_dist.settings.cli import parse
from lora_dist.settings.predict import PredictSettings
from lora_dist.settings.predict_contradictions import contradictions, missing_paths, require_shareable


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
        "--adapter a b c --average --merge_to m --adapter_scale 0.5",
        "--adapter a b --greedy_soup demo:digits/validation --onnx f",
        "--adapter a b --adapter_scale 0 --images x",
        "--adapter a --onnx f --serve",
        "--adapter a b --serve",
        "--adapter a --export_legacy_names e",
        "--model m --onnx f",
        "--model m --serve --device cuda --top_k 3 --batch_size 1 --port 0 --host h --max_files 1",
        "--adapter a --images x --output o --format csv --grid g --top_k 2 --batch_size 1 --num_workers 0 --device cpu",
        "--adapter a --merge_to m --dtype fp16 --merge_tolerance 1e-3",
        "--adapter a --merge_to m --serve --port 80",
        "--onnx f --images x --device cpu",
        "--onnx f --serve",
        "--adapter a --images x --images_from l --output_type embeddings --output o.parquet --precision bf16",
        "--adapter a --dataset_name d --dataset_split test[:9] --image_column_name i --output_type logits",
        "--onnx f --dataset_name d --dataset_split test --streaming --output_type probabilities --precision fp32",
    ],
)
def test_valid_combinations_are_accepted(line: str) -> None:
    _parse(line)


def test_a_repeated_adapter_is_refused_with_one_flag_for_all() -> None:
    with pytest.raises(UserError, match="--adapter: given 3 times; write --adapter a b c d"):
        _parse("--adapter a --adapter=b --adapter c d --images x")


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("--adapter org/name@v1 --serve", "org/name@v1"),
        ("--adapter day=a --weights 1 --serve", "day"),
        ("--adapter day=a b --weights 0.7 0.3 --serve", "0.7 x day + 0.3 x b"),
        ("--adapter day=a b --serve", "day, b"),
        ("--adapter day=a b --weights 0.7 0.3 --adapter_scale 0.5 --serve", "0.7 x day + 0.3 x b, LoRA scaled by 0.5"),
        ("--adapter day=a b --images x", "day, b"),
        ("--model m --serve", "m"),
        ("--onnx f --serve", "f"),
    ],
)
def test_the_title_names_the_model(line: str, title: str) -> None:
    assert _parse(line).title == title


def test_an_average_has_equal_weights_that_add_up_to_one(tmp_path: Path) -> None:
    odd = tmp_path / "r=16"
    odd.mkdir()
    settings = _parse(f"--adapter day=a b {odd} --average --serve")
    source = settings.source.averaged_over(["day", "b", str(odd)])
    assert source.weights == [1 / 3] * 3
    assert source.named_adapters == settings.source.named_adapters
    two = settings.source.averaged_over([str(odd), "day"])
    assert (two.named_adapters, two.weights) == ([("day", "a"), (str(odd), str(odd))], [0.5, 0.5])
    assert not two.side_by_side


def test_an_adapter_has_the_given_name_or_that_of_its_source(tmp_path: Path) -> None:
    odd = tmp_path / "r=16"
    odd.mkdir()
    source = _parse(f"--adapter day=a b {odd} --images x").source
    assert source.named_adapters == [("day", "a"), ("b", "b"), (str(odd), str(odd))]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--images x", "--adapter, --model, --onnx: no model: set one of them"),
        ("--adapter a --model m --images x", "--adapter, --model: use only one of them"),
        ("--adapter a b a --images x", "--adapter: two adapters are named a: use NAME=DIRECTORY"),
        ("--adapter a=x a=y --images x", "--adapter: two adapters are named a: use NAME=DIRECTORY"),
        ("--adapter a", "--images, --merge_to, --onnx, --serve: nothing to do"),
        ("--onnx f", "--images, --merge_to, --onnx, --serve: nothing to do"),
        ("--onnx f --images x --merge_to m", "--onnx, --merge_to: only adapters can be merged"),
        ("--adapter a --images x --labels l", "--labels: unknown flag; use --class_names"),
        ("--onnx f --images x --class_names l", "--onnx, --class_names: --class_names needs an adapter"),
        ("--model m --images x --base_model b", "--model, --base_model: --base_model needs an adapter"),
        ("--adapter a b --onnx f", "--adapter, --onnx: --onnx needs one model"),
        ("--adapter a b --merge_to m", "--adapter, --merge_to: --merge_to needs one model"),
        ("--adapter a b --images x --grid g", "--grid, --adapter: --grid shows the predictions of one adapter"),
        ("--adapter a b --images x --weights 1", "--weights, --adapter: 1 weights for 2 adapters"),
        ("--adapter a b --images x --weights 1 1", "--weights: the weights add up to 2 instead of 1"),
        ("--adapter a b --images x --weights 0.5 0.5 --average", "--weights, --average: several ways to merge"),
        ("--adapter a --images x --average", "--average, --adapter: --average needs several adapters"),
        ("--adapter a b --images x --greedy_soup nowhere", "--greedy_soup: no such directory: nowhere"),
        ("--model m --images x --adapter_scale 0.5", "--model, --adapter_scale: --adapter_scale needs an adapter"),
        ("--adapter a --images x --dtype bf16", "--dtype, --merge_to: --dtype needs --merge_to"),
        (
            "--adapter a --images x --merge_tolerance 1e-4",
            "--merge_tolerance, --merge_to: --merge_tolerance needs --merge_to",
        ),
        ("--adapter a --serve --dtype bf16", "--dtype, --merge_to: --dtype needs --merge_to"),
        ("--adapter a --images x --output new.TXT", "--output, --format: .txt names no format: use .jsonl, .csv or"),
        ("--adapter a --merge_to m --output o", "--output, --images: --output needs --images"),
        ("--adapter a --merge_to m --format csv", "--format, --images: --format needs --images"),
        ("--adapter a --merge_to m --grid g", "--grid, --images: --grid needs --images"),
        ("--adapter a --onnx f --top_k 1", "--top_k, --images: --top_k needs --images"),
        ("--adapter a --merge_to m --batch_size 8", "--batch_size, --images: --batch_size needs --images"),
        ("--adapter a --merge_to m --num_workers 0", "--num_workers, --images: --num_workers needs --images"),
        ("--adapter a --merge_to m --device cpu", "--device, --images: --device needs --images"),
        ("--adapter a --images x --port 8000", "--port, --serve: --port needs --serve"),
        ("--adapter a --merge_to m --host h", "--host, --serve: --host needs --serve"),
        ("--model m --images x --max_upload_mb 1", "--max_upload_mb, --serve: --max_upload_mb needs --serve"),
        ("--onnx f --images x --max_megapixels 1", "--max_megapixels, --serve: --max_megapixels needs --serve"),
        ("--adapter a --images x --max_files 1", "--max_files, --serve: --max_files needs --serve"),
        ("--adapter a --dtype bf16", "--images, --merge_to, --onnx, --serve: nothing to do"),
        ("--adapter a --images x --int8", "--int8, --onnx: --int8 applies to an export"),
        ("--onnx f --images x --int8", "--int8, --onnx: --int8 applies to an export"),
        ("--onnx f --images x --fp16", "--fp16, --onnx: --fp16 applies to an export"),
        ("--adapter a --onnx f --int8 --fp16", "--int8, --fp16: use only one of them"),
        ("--onnx f --images x --device cuda", "--onnx, --device: ONNX files run on the CPU"),
        ("--adapter a --serve --images x", "--serve, --images: the server does not use --images"),
        ("--adapter a --serve --output o", "--serve, --output: the server does not use --output"),
        (
            "--adapter a --serve --max_megapixels 179",
            "--max_megapixels, --max_image_pixels: no image can be that large: raise --max_image_pixels",
        ),
        ("--adapter a --serve --grid g", "--serve, --grid: the server does not use --grid"),
        ("--adapter a --serve --format csv", "--serve, --format: the server does not use --format"),
        ("--adapter a --serve --num_workers 0", "--serve, --num_workers: the server does not use --num_workers"),
        ("--onnx f --images x --trust_remote_code", "--onnx, --trust_remote_code: ONNX files contain no code"),
        ("--onnx f --images x --precision bf16", "--onnx, --precision: ONNX files run in their own precision"),
        ("--onnx f --images x --output_type embeddings", "--onnx, --output_type: ONNX files give logits only"),
        ("--adapter a --dataset_name d", "--dataset_name, --dataset_split: no split"),
        ("--adapter a --images x --streaming", "--streaming, --dataset_name: --streaming needs --dataset_name"),
        ("--adapter a --images x --dataset_name d --dataset_split s", "--images, --dataset_name: files or a data set"),
        ("--adapter a --dataset_name d --dataset_split s[:9] --streaming", "--streaming, --dataset_split: streams do"),
        ("--adapter a --dataset_name d --dataset_split s --merge_to m", "--merge_to, --dataset_name: --merge_to comp"),
        ("--adapter a --dataset_name d --dataset_split s --serve", "--serve, --dataset_name: the server does not use"),
        ("--adapter a --images x --format parquet", "--format, --output: parquet cannot be printed"),
        ("--adapter a --images x --output_type logits --output o.csv", "--output_type, --format: CSV has no lists"),
        ("--adapter a --images x --output_type logits --top_k 2", "--top_k, --output_type: --output_type logits has"),
        ("--adapter a --serve --output_type logits", "--serve, --output_type: the server does not use --output_type"),
        ("--adapter a --merge_to m --precision fp32", "--precision, --images: --precision needs --images"),
    ],
)
def test_a_contradiction_is_one_problem_by_name(line: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        _parse(line)
    first, *problems = str(caught.value).splitlines()
    assert first == "1 problem with the settings of predict"
    assert problems[0].strip().startswith(words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--adapter a --images x", "set --output"),
        ("--adapter a --images x --output rows.csv --merge_to m", "--merge_to needs one process"),
        ("--adapter a --serve", "--serve needs one process"),
        ("--adapter a b --greedy_soup demo:digits/validation --images x", "--greedy_soup needs one process"),
    ],
)
def test_several_processes_share_nothing_but_images_for_a_file(line: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        require_shareable(_parse(line))
    require_shareable(_parse("--onnx m.onnx --images x --output rows.csv"))


@pytest.mark.parametrize(
    ("line", "problems"),
    [
        ("--adapter runs/x/adapter ./a b=/c/d --images nowhere", ["runs/x/adapter", "./a", "/c/d", "nowhere"]),
        ("--model a/b/c --base_model ~/base --images_from l --labels_file f", ["a/b/c", "~/base", "l", "f"]),
        ("--onnx f --images nowhere/*.png demo:digits/validation", ["f; pass an --adapter or --model to write it"]),
        ("--adapter org/name@refs/pr/1 name --onnx new", []),
    ],
)
def test_a_path_of_nothing_is_named_before_anything_is_loaded(line: str, problems: list[str]) -> None:
    """A name with one slash may be on the Hub, and a pattern may match a file."""
    settings = parse(
        PredictSettings, line.split(), prog="", description="", contradictions=lambda _: (), takes_config=False
    )
    assert [problem.message.partition(": ")[2] for problem in missing_paths(settings)] == problems


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("--images x --labels_file t.csv --output ./t.csv", "--output, --labels_file: t.csv would be replaced"),
        ("--images_from t.csv --output link.csv", "--output, --images_from: t.csv would be replaced"),
        ("--images x --compare_to t.csv --output t.csv", "--output, --compare_to: t.csv would be replaced"),
        ("--images x --class_names t.csv --grid t.csv", "--grid, --class_names: t.csv would be replaced"),
        ("--dataset_name data --dataset_split test --output data/rows.csv", "would become part of the data"),
    ],
)
def test_what_a_prediction_reads_is_not_replaced(
    line: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "t.csv").write_text("path,label\n")
    (tmp_path / "link.csv").symlink_to("t.csv")
    with pytest.raises(UserError, match=problem):
        _parse(f"--adapter a {line}")
