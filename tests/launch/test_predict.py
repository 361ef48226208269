"""The prediction command in real processes: files in, rows out, and adapters merged into plain models."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lora_dist_testing.launching import command, environment, flags, predict, started
from lora_dist_testing.tiny import make_image, write_bundle
from PIL import Image
from transformers import pipeline

from lora_dist.deployment.classify import Inference, classify
from lora_dist.model.trained.classifier import load_classifier

LABELS = ['comma, "quoted"', "two\nlines", "émoji 🦊 & <b>HTML</b>"]
MODES = ("L", "LA", "RGBA", "P", "CMYK", "I;16", "1", "F")


def _bundle(directory: Path, base_model: Path, seed: int = 0, labels: Sequence[str] = LABELS) -> Path:
    write_bundle(directory, base_model, labels, seed=seed, scale=0.5, lora_r=4)
    return directory


@pytest.fixture(scope="module")
def adapter(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose class names are hard on every format."""
    return _bundle(tmp_path_factory.mktemp("bundles") / "adapter", vit)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.convert("L").convert("F") if mode == "F" else image.convert(mode)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of every mode, in nested folders, with good and bad company."""
    root = tmp_path_factory.mktemp("images")
    for mode in MODES:
        suffix = {"CMYK": "jpg", "F": "tif"}.get(mode, "png")
        _in_mode(make_image(0, 1), mode).save(root / f"mode {mode.replace(';', '')}.{suffix}")
    turned = Image.Exif()
    turned[0x0112] = 6
    make_image(0, 1).rotate(90, expand=True).save(root / "turned.png", exif=turned)
    make_image(0, 1).save(root / "mode RGB.png")
    (root / "deep" / "er").mkdir(parents=True)
    make_image(1, 1).save(root / "deep" / "er" / "UPPER.PNG")
    make_image(2, 1).save(root / "deep" / "er" / "two.jpeg")
    (root / "notes.txt").write_text("no image")
    make_image(2, 1).save(root / ".hidden.png")
    return root


def _rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_folders_files_and_patterns_in_every_image_mode(adapter: Path, folder: Path, tmp_path: Path) -> None:
    """One process for all of it: rows come in order, each file once, and the grid is drawn beside them."""
    result = predict(
        "--adapter",
        adapter,
        "--images",
        folder / "turned.png",
        folder,
        folder / "deep" / "*" / "*",
        *flags(top_k=5, grid=tmp_path / "new" / "grid.png", batch_size=4),
    )
    rows = _rows(result.stdout)
    paths = [str(Path(row["path"]).relative_to(folder)) for row in rows]
    assert paths[0] == "turned.png"
    assert sorted(paths) == sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("notes.txt", ".hidden.png")
    )
    assert len(paths) == len(MODES) + 4
    by_name = dict(zip(paths, rows, strict=True))
    for row in rows:
        assert "error" not in row
        assert [entry["label"] for entry in row["top_k"]] == [
            entry["label"] for entry in sorted(row["top_k"], key=lambda entry: -entry["score"])
        ]
        assert {entry["label"] for entry in row["top_k"]} == set(LABELS)
        assert sum(entry["score"] for entry in row["top_k"]) == pytest.approx(1, abs=1e-5)
        assert (row["label"], row["score"]) == (row["top_k"][0]["label"], row["top_k"][0]["score"])
    # Lossless modes that keep the picture give its prediction, and so does EXIF's turn.
    for name in ("mode RGBA.png", "turned.png"):
        assert by_name[name]["score"] == pytest.approx(by_name["mode RGB.png"]["score"], abs=1e-6)
    for name in ("mode LA.png", "mode I16.png", "mode F.tif"):
        assert by_name[name]["score"] == pytest.approx(by_name["mode L.png"]["score"], abs=1e-6)
    assert by_name["mode L.png"]["score"] != by_name["mode RGB.png"]["score"]
    with Image.open(tmp_path / "new" / "grid.png") as grid:
        assert grid.format == "PNG"
        assert len(grid.convert("RGB").getcolors(1 << 20) or []) > 100


def test_bad_files_get_a_row_and_the_others_go_on(adapter: Path, tmp_path: Path) -> None:
    """A truncated, an empty and a foreign file, a dangling link; commas and quotes in names, as CSV."""
    odd = tmp_path / 'a "quoted", name.png'
    make_image(0, 0).save(odd)
    make_image(1, 0).save(tmp_path / "z.png")
    content = odd.read_bytes()
    (tmp_path / "truncated.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    result = predict(
        *flags(
            adapter=adapter,
            images=tmp_path,
            output=tmp_path / "out" / "rows.csv",
            top_k=2,
            grid=tmp_path / "grid.png",
            batch_size=2,
            num_workers=1,
        ),
        code=1,
    )
    assert "4 of 6 images could not be read" in result.stderr
    assert f"wrote {tmp_path / 'out' / 'rows.csv'}" in result.stderr
    assert "images/s" not in result.stderr, "a progress bar is for a terminal"
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    with (tmp_path / "out" / "rows.csv").open(encoding="utf-8", newline="") as file:
        rows = {Path(row["path"]).name: row for row in csv.DictReader(file)}
    assert list(rows) == ['a "quoted", name.png', "dangling.png", "empty.jpg", "text.png", "truncated.png", "z.png"]
    for name, row in rows.items():
        assert row.keys() == {"path", "label", "score", "label_2", "score_2", "error"}
        if name in (odd.name, "z.png"):
            assert {row["label"], row["label_2"]} <= set(LABELS)
            assert float(row["score"]) >= float(row["score_2"]) > 0
            assert row["error"] == ""
        else:
            assert name in row["error"]
            assert row["label"] == row["score"] == row["label_2"] == row["score_2"] == ""
    assert Image.open(tmp_path / "grid.png").size[0] > 128


def test_any_class_and_file_name_goes_through_a_pipe_of_another_encoding(
    adapter: Path, folder: Path, tmp_path: Path
) -> None:
    """In a locale without UTF-8, and with a file name that is none."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    try:
        make_image(0, 0).save(odd)
    except OSError:
        odd = tmp_path / "café.png"
        make_image(0, 0).save(odd)
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    images = (folder / "deep" / "er" / "two.jpeg", odd)
    text = predict("--adapter", adapter, "--images", *images, "--top_k", 3, "--device", "cpu", **ascii_only).stdout
    rows = _rows(text)
    assert [os.fsencode(row["path"]) for row in rows] == [os.fsencode(path) for path in images]
    for row in rows:
        assert {entry["label"] for entry in row["top_k"]} == set(LABELS)


def test_a_merged_model_is_a_plain_one_and_predicts_the_same(adapter: Path, folder: Path, tmp_path: Path) -> None:
    images = [folder / "mode RGB.png", folder / "deep"]
    merged = tmp_path / "merged"
    merge = predict("--adapter", adapter, "--merge_to", merged, "--images", *images, "--top_k", 3)
    assert "merged into" in merge.stderr
    expected = _rows(merge.stdout)
    assert not (merged / "adapter_config.json").exists()
    assert _rows(predict("--model", merged, "--images", *images, "--top_k", 3).stdout) == expected
    serve = pipeline("image-classification", model=str(merged), device="cpu")
    unmerged = classify(
        load_classifier(adapter),
        [row["path"] for row in expected],
        Inference(torch.device("cpu"), batch_size=8, num_workers=0),
        top_k=3,
    )
    for row, own in zip(expected, unmerged, strict=True):
        served = serve(Image.open(row["path"]).convert("RGB"), top_k=3)
        for entry, theirs, (label, score) in zip(row["top_k"], served, own.top_k, strict=True):
            assert entry["label"] == theirs["label"] == label
            assert entry["score"] == pytest.approx(theirs["score"], abs=1e-5)
            assert entry["score"] == pytest.approx(score, abs=1e-5)


def _refused(*arguments: object, words: Sequence[str]) -> None:
    result = predict(*arguments, code=2)
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert result.stdout == ""


def test_places_and_adapters_are_looked_at_before_anything_is_done(adapter: Path, vit: Path, tmp_path: Path) -> None:
    """Nothing is merged where the file of the ONNX model is there already, or where there is nothing to merge."""
    (tmp_path / "old.onnx").touch()
    merged = tmp_path / "merged"
    words = ["nothing was done", f"--onnx {tmp_path / 'old.onnx'} exists"]
    _refused("--adapter", adapter, "--merge_to", merged, "--onnx", tmp_path / "old.onnx", words=words)
    words = [f"{vit} is not an adapter", "a whole model", "--model"]
    _refused("--adapter", vit, "--merge_to", merged, "--export_legacy_names", tmp_path / "old", words=words)
    assert [path.name for path in tmp_path.iterdir()] == ["old.onnx"]


def test_a_name_of_nothing_is_refused_before_the_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.png"
    words = [f"--images: no such file or directory: {missing}", f"--adapter: no such directory: {tmp_path}"]
    _refused("--adapter", tmp_path / "no adapter", "--images", folder, missing, words=words)


def test_a_reader_that_stops_early_ends_it_without_a_traceback(adapter: Path, tmp_path: Path) -> None:
    """As `| head -1` does. The rows are more than a pipe holds, so that some must meet a closed one."""
    make_image(0, 0).save(tmp_path / "000.png")
    for number in range(1, 300):
        (tmp_path / f"{number:03d}.png").hardlink_to(tmp_path / "000.png")
    words = command("lora_dist.predict", ["--adapter", adapter, "--images", tmp_path, "--top_k", 3])
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    assert process.stderr is not None
    first = process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=120) == -signal.SIGPIPE
    assert json.loads(first)["label"] in LABELS
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


WATCH = """
import sys
import accelerate, torch.distributed

def forbidden(*args, **kwargs):
    raise AssertionError("predict built an Accelerator")

accelerate.Accelerator.__init__ = accelerate.PartialState.__init__ = forbidden
torch.distributed.init_process_group = forbidden
from lora_dist.predict import main
main(sys.argv[1:])
assert "deepspeed" not in sys.modules
"""


def test_prediction_builds_no_accelerator_even_under_the_variables_of_a_launch(adapter: Path, folder: Path) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    result = subprocess.run(
        [sys.executable, "-c", WATCH, "--adapter", str(adapter), "--images", str(folder / "turned.png")],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(**launched),
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["path"] == os.fspath(folder / "turned.png")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images, one of them broken, in more parts than two processes write at once."""
    root = tmp_path_factory.mktemp("many")
    for index in range(300):
        make_image(index % 3, index).save(root / f"{index:03d}.png")
    (root / "150.png").write_bytes(b"broken")
    return root


@pytest.mark.parametrize("suffix", ["csv", pytest.param("parquet", marks=pytest.mark.slow)])
def test_processes_share_the_images_and_killed_ones_go_on(
    suffix: str, adapter: Path, vit: Path, many: Path, tmp_path: Path
) -> None:
    """Killed once; then the rows are those of one process that nothing disturbed."""
    other = _bundle(tmp_path / "other", vit, seed=1)
    named = ("--adapter", f"day={adapter}", f"night={other}", "--images", many, "--top_k", 2)
    expected, out = tmp_path / f"expected.{suffix}", tmp_path / f"rows.{suffix}"
    predict(*named, "--output", expected, code=1)
    parts = tmp_path / f"rows.{suffix}.parts"
    flags_ = (*named, "--output", out)
    with started(tmp_path / "log", *flags_, module="lora_dist.predict", launch_file="ddp_cpu.yaml") as launch:
        launch.wait_for(lambda: len([*parts.glob("part-*")]) >= 20)
        for one in launch.processes():
            one.kill()
    assert not out.exists()
    refused = predict(*named[:-1], 1, "--output", out, launch_file="ddp_cpu.yaml", code=1)
    assert f"{parts} has parts of a prediction of other images, or by another model or settings" in refused.stderr
    result = predict(*flags_, launch_file="ddp_cpu.yaml", code=1)
    assert "1 of 300 images could not be read" in result.stderr
    assert f"continuing {parts}, which has " in result.stderr
    if suffix == "csv":
        assert out.read_text() == expected.read_text()
    else:
        found, wanted = (pq.read_table(path) for path in (out, expected))
        assert found.schema.equals(wanted.schema, check_metadata=True)
        columns = ["adapter", "path", "label", "error"]
        assert found.select(columns).equals(wanted.select(columns))
        assert np.allclose(*(table["score"].to_numpy() for table in (found, wanted)), atol=1e-6, equal_nan=True)
    assert not parts.exists()


@pytest.mark.slow
def test_ten_thousand_files_survive_kills_at_random_moments(adapter: Path, many: Path, tmp_path: Path) -> None:
    """Killed while it classifies, and from the last part on, when the parts are joined: no row is lost or doubled."""
    root = tmp_path / "ten thousand"
    root.mkdir()
    names = [f"{number:05d}.png" for number in range(10_000)]
    for number, name in enumerate(names):
        (root / name).hardlink_to(many / f"{number % 300:03d}.png")
    (tmp_path / "list.txt").write_text("\n".join(f"{root / name}" for name in names))
    common = flags(adapter=adapter, images_from=tmp_path / "list.txt", output_type="embeddings")
    predict(*common, "--output", tmp_path / "expected.parquet", code=1)
    out = tmp_path / "rows.parquet"
    parts = tmp_path / "rows.parquet.parts"
    words = (*common, "--output", out)
    random = np.random.default_rng()
    seen = []
    # The last moment is the join: all parts are there, and the file is not.
    for moment in [*sorted(random.integers(1, 64, 4).tolist()), 64]:
        with started(tmp_path / "log", *words, module="lora_dist.predict", launch_file="ddp_cpu.yaml") as launch:
            launch.wait_for(lambda moment=moment: len([*parts.glob("part-*")]) >= moment)
            pause = random.uniform(0, 0.3)
            time.sleep(pause)
            for one in launch.processes():
                one.kill()
        seen.append((moment, pause, len([*parts.glob("part-*")]), out.exists()))
    predict(*words, launch_file="ddp_cpu.yaml", code=1)
    found, wanted = (pq.read_table(path) for path in (out, tmp_path / "expected.parquet"))
    assert found["path"].to_pylist() == [f"{root / name}" for name in names], seen
    assert found.select(["label", "error"]).equals(wanted.select(["label", "error"])), seen
    assert sum(error is not None for error in found["error"].to_pylist()) == len(names[150::300])
    numbers = [np.array(table["embeddings"].drop_null().to_pylist()) for table in (found, wanted)]
    assert np.allclose(*numbers, atol=1e-5), seen
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "expected.parquet",
        "list.txt",
        "log",
        "rows.parquet",
        "ten thousand",
    ]
