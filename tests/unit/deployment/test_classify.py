"""Files to rows: which images a name stands for, and how rows are written, whatever stands in them."""

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lora_dist_testing.disks import small_disk
from lora_dist_testing.tiny import make_image
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.deployment.classify import (
    Inference,
    Precision,
    Row,
    choose_batch_size,
    choose_device,
    choose_precision,
    choose_workers,
    classify,
)
from lora_dist.deployment.export import merge
from lora_dist.deployment.inputs import find_images
from lora_dist.deployment.outputs import draw_grid, spread, writer
from lora_dist.errors import UserError
from lora_dist.model.trained.classifier import Classifier

HARD = [
    "plain",
    "a, b",
    'say "hi"',
    "two\nlines",
    "carriage\rreturn",
    "tab\t;",
    "🦊 émoji",
    "<b>&amp;</b>",
    " spaces ",
    "'",
]


def _touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_a_folder_stands_for_all_images_below_it_in_order(tmp_path: Path) -> None:
    _touch(tmp_path, "b/2.png", "b/10.JPG", "a.webp", "b/c/d.TIFF", "b/notes.txt", ".hidden.png", "b/Thumbs.db")
    assert find_images([str(tmp_path)]) == [
        str(tmp_path / name) for name in ("a.webp", "b/10.JPG", "b/2.png", "b/c/d.TIFF")
    ]


def test_a_pattern_stands_for_what_it_matches_and_each_file_comes_once(tmp_path: Path) -> None:
    _touch(tmp_path, "x/1.png", "x/2.png", "y/3.png", "y/4.odd")
    names = [str(tmp_path / "y/4.odd"), str(tmp_path / "**" / "*.png"), str(tmp_path / "x"), str(tmp_path / "y/4.odd")]
    assert find_images(names) == [str(tmp_path / name) for name in ("y/4.odd", "x/1.png", "x/2.png", "y/3.png")]


def test_a_name_with_the_characters_of_a_pattern_is_taken_as_it_is(tmp_path: Path) -> None:
    _touch(tmp_path, "photo [1].png", "photo 1.png", "what?.png")
    for name in ("photo [1].png", "what?.png"):
        assert find_images([str(tmp_path / name)]) == [str(tmp_path / name)]


def test_linked_folders_are_followed_and_dangling_links_kept_to_be_reported(tmp_path: Path) -> None:
    _touch(tmp_path, "real/1.png", "shown/keep.txt")
    (tmp_path / "shown" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "shown" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert find_images([str(tmp_path / "shown")]) == [
        str(tmp_path / "shown" / "gone.png"),
        str(tmp_path / "shown" / "linked" / "1.png"),
    ]


def test_a_name_of_nothing_is_refused_by_name(tmp_path: Path) -> None:
    _touch(tmp_path, "empty/notes.txt")
    for name in ("missing.png", "*.png", "empty"):
        with pytest.raises(UserError, match="no images found") as caught:
            find_images([str(tmp_path / name)])
        assert str(tmp_path / name) in str(caught.value)


ROWS = [
    *(Row(f"{name}.png", [(name, 0.75), ("other", 0.25)]) for name in HARD),
    Row("bad.png", [], 'bad.png: broken, "truly"\nbroken'),
]


def _write(path: Path, format_: Any = None, top_k: int = 2, rows: list[Row] = ROWS) -> None:
    with writer(str(path), format_, top_k) as write:
        for row in rows:
            write(row)


def test_json_lines_carry_every_name(tmp_path: Path) -> None:
    _write(tmp_path / "new" / "rows.jsonl")
    lines = (tmp_path / "new" / "rows.jsonl").read_bytes().decode("utf-8").split("\n")
    assert lines.pop() == ""
    contents = [json.loads(line) for line in lines]
    assert contents[-1] == {"path": "bad.png", "error": 'bad.png: broken, "truly"\nbroken'}
    for row, content in zip(ROWS[:-1], contents[:-1], strict=True):
        assert content == {
            "path": row.path,
            "label": row.top_k[0][0],
            "score": 0.75,
            "top_k": [{"label": row.top_k[0][0], "score": 0.75}, {"label": "other", "score": 0.25}],
        }


def test_csv_carries_every_name(tmp_path: Path) -> None:
    _write(tmp_path / "rows.CSV")
    with (tmp_path / "rows.CSV").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [*HARD, ""]
    assert [row["path"] for row in rows] == [row.path for row in ROWS]
    assert {row["label_2"] for row in rows} == {"other", ""}
    assert rows[0]["score"] == "0.750000"
    assert rows[-1]["error"] == ROWS[-1].error


def test_a_row_below_the_threshold_is_unknown_and_keeps_its_scores(tmp_path: Path) -> None:
    rows = [Row("sure.png", [("a", 0.8), ("b", 0.2)]), Row("unsure.png", [("b", 0.6), ("a", 0.4)]), ROWS[-1]]
    assert [row.known_from(None) for row in rows] == rows
    assert rows[0].known_from(0.8).label == "a"
    judged = [row.known_from(0.7) for row in rows]
    _write(tmp_path / "rows.jsonl", rows=judged)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line.get("label") for line in lines] == ["a", "unknown", None]
    assert lines[1]["score"] == 0.6
    assert [entry["label"] for entry in lines[1]["top_k"]] == ["b", "a"]
    _write(tmp_path / "rows.csv", rows=judged)
    with (tmp_path / "rows.csv").open(newline="") as file:
        cells = [(row["label"], row["score"], row["label_2"]) for row in csv.DictReader(file)]
    assert cells == [("a", "0.800000", "b"), ("unknown", "0.600000", "a"), ("", "", "")]


def test_columns_of_classes_that_do_not_exist_stay_empty(tmp_path: Path) -> None:
    _write(tmp_path / "rows.csv", top_k=4)
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    assert {len(line) for line in lines} == {10}
    assert lines[1][-5:] == [""] * 5


def test_the_format_can_be_another_than_that_of_the_name(tmp_path: Path) -> None:
    _write(tmp_path / "rows.csv", "jsonl")
    assert json.loads((tmp_path / "rows.csv").read_text("utf-8").splitlines()[0])["label"] == "plain"
    _write(tmp_path / "rows", "csv")
    assert (tmp_path / "rows").read_text("utf-8").startswith("path,label,score,label_2,score_2,error")


@pytest.mark.parametrize("format_", ["jsonl", "csv"])
def test_a_file_name_that_is_no_text_is_written_all_the_same(format_: str, tmp_path: Path) -> None:
    path = os.fsdecode(b"caf\xe9.png")
    _write(tmp_path / "rows", format_, rows=[Row(path, [("a", 1.0)])])
    last = (tmp_path / "rows").read_text("utf-8").splitlines()[-1]
    if format_ == "jsonl":
        assert os.fsencode(json.loads(last)["path"]) == b"caf\xe9.png"
    else:
        assert last.startswith("caf\\udce9.png,a,")


def test_rows_are_in_the_file_as_soon_as_they_are_written(tmp_path: Path) -> None:
    with writer(str(tmp_path / "rows.jsonl"), None, 1) as write:
        write(ROWS[0])
        assert (tmp_path / "rows.jsonl").read_text("utf-8").count("\n") == 1


def test_an_output_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--output {tmp_path}"), writer(str(tmp_path), None, 1):
        pass


@pytest.mark.root
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_disk_that_fills_up_is_said_by_name(name: str, tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", "16k") as disk,
        pytest.raises(UserError, match=rf"--output {disk / name}: cannot be written \(No space left on device\)"),
        writer(str(disk / name), None, 1) as write,
    ):
        write(Row("x" * 100_000, [("a", 0.5)]))


def test_a_grid_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    make_image(0, 0).save(tmp_path / "good.png")
    rows = [(Row("good", [("a", 0.5)]), str(tmp_path / "good.png"))]
    with pytest.raises(UserError, match=rf"--grid {tmp_path}/good\.png/grid\.png: cannot be written"):
        draw_grid(rows, tmp_path / "good.png" / "grid.png")
    draw_grid(rows, tmp_path / "grid.odd")
    assert Image.open(tmp_path / "grid.odd").format == "PNG"


class Brightness(nn.Module):
    """Three classes: how red, green and blue an image is. Notes the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, pixel_values: Tensor) -> Any:
        self.sizes.append(len(pixel_values))
        return SimpleNamespace(logits=10 * pixel_values.mean(dim=(2, 3)))


def _classifier() -> Classifier:
    return Classifier(Brightness(), ViTImageProcessor(size={"height": 8, "width": 8}), ["red", "green", "blue"])


def _colors(root: Path) -> list[str]:
    for number, color in enumerate(["red", "lime", "blue", "red", "blue"]):
        Image.new("RGB", (9, 7), color).save(root / f"{number}.png")
    (root / "1b.png").write_text("broken")
    return [str(root / f"{name}.png") for name in ("0", "1", "1b", "2", "3", "4")]


@pytest.mark.parametrize("workers", [0, 2, None])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_every_file_gets_its_own_prediction_in_order(batch_size: int, workers: int | None, tmp_path: Path) -> None:
    files = _colors(tmp_path)
    classifier = _classifier()
    inference = Inference(torch.device("cpu"), batch_size=batch_size, num_workers=workers)
    rows = list(classify(classifier, files, inference, top_k=9))
    assert [row.path for row in rows] == files
    assert [row.top_k[0][0] if row.top_k else None for row in rows] == ["red", "green", None, "blue", "red", "blue"]
    assert [row.error is not None for row in rows] == [False, False, True, False, False, False]
    for row in rows:
        if row.top_k:
            assert len(row.top_k) == 3
            assert sum(score for _, score in row.top_k) == pytest.approx(1)
    assert sum(classifier.model.sizes) == 5
    assert max(classifier.model.sizes) <= batch_size


@pytest.mark.parametrize("workers", [0, 1])
def test_any_part_of_the_images_can_be_classified_with_all_values(workers: int, tmp_path: Path) -> None:
    files = _colors(tmp_path)
    inference = Inference(torch.device("cpu"), batch_size=2, num_workers=workers)
    found = {
        kind: list(classify(_classifier(), files, inference, indices=[4, 2, 3], output_type=kind, top_k=1))
        for kind in ("probabilities", "logits")
    }
    for kind, rows in found.items():
        assert [row.path for row in rows] == [files[index] for index in (4, 2, 3)]
        assert rows[1].values is None
        assert rows[1].error
        for row, label in ((rows[0], 0), (rows[2], 2)):
            assert row.values is not None
            assert row.values.argmax() == label, kind
    for row, raw in zip(found["probabilities"], found["logits"], strict=True):
        if row.values is not None and raw.values is not None:
            assert np.allclose(torch.from_numpy(raw.values).softmax(0), row.values)
            assert row.top_k[0][1] == row.values.max()


def test_the_forward_pass_takes_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    seen = []

    class Layer(Brightness):
        def forward(self, pixel_values: Tensor) -> Any:
            logits = pixel_values.mean(dim=(2, 3)) @ torch.eye(3)
            seen.append(logits.dtype)
            return SimpleNamespace(logits=logits)

    classifier = Classifier(Layer(), ViTImageProcessor(size={"height": 8, "width": 8}), ["red", "green", "blue"])
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        inference = Inference(torch.device("cpu"), batch_size=8, num_workers=0, precision=precision)
        rows = list(classify(classifier, _colors(tmp_path), inference, top_k=3, output_type="logits"))
        assert rows[0].values is not None
        assert rows[0].values.dtype == np.float32
        # Or a score could be above 1.
        assert sum(score for _, score in rows[0].top_k) == pytest.approx(1, abs=1e-6)
    assert seen == [torch.float32, torch.bfloat16]


def test_bf16_is_for_the_devices_that_compute_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    devices = [torch.device(name) for name in ("cuda", "cpu", "mps")]
    assert [choose_precision("auto", device) for device in devices] == ["bf16", "fp32", "fp32"]
    assert [choose_precision("fp16", device) for device in devices] == ["fp16"] * 3
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert choose_precision("auto", torch.device("cuda")) == "fp32"


def test_decoders_fit_the_cores_and_the_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, batch = torch.device("cuda"), 128 * 3 * 224 * 224
    monkeypatch.setattr("lora_dist.deployment.classify.cores_per_process", lambda: 8)
    monkeypatch.setattr("lora_dist.deployment.classify.free_bytes", lambda _: 64 * 2**30)
    assert choose_workers(torch.device("cpu"), batch) == 1
    assert choose_workers(cuda, batch) == 7
    monkeypatch.setattr("lora_dist.deployment.classify.free_bytes", lambda _: 64 * 2**20)
    assert choose_workers(cuda, batch) == 1


def test_logits_that_are_not_finite_end_it_in_words(tmp_path: Path) -> None:
    """NaN is no JSON, and a class that it was rounded to is no prediction."""
    classifier = _classifier()
    classifier.model.register_forward_hook(lambda _, __, output: SimpleNamespace(logits=output.logits / 0))
    inference = Inference(torch.device("cpu"), batch_size=2, num_workers=0)
    with pytest.raises(UserError, match=r"logits of the model are not finite"):
        list(classify(classifier, _colors(tmp_path), inference, top_k=1))


def test_rows_come_while_the_rest_is_still_to_be_done(tmp_path: Path) -> None:
    classifier = _classifier()
    rows = classify(classifier, _colors(tmp_path), Inference(torch.device("cpu"), batch_size=1, num_workers=0), top_k=1)
    assert next(rows).top_k[0][0] == "red"
    assert classifier.model.sizes == [1]


def test_the_images_drawn_are_spread_over_all() -> None:
    assert spread(355, 32)[:3] == [0, 11, 22]
    assert len(set(spread(355, 32))) == 32
    assert max(spread(355, 32)) > 340
    assert spread(3, 32) == [0, 1, 2]


def test_the_grid_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    make_image(0, 0).save(tmp_path / "good.png")
    best = [("a class name much too long for its caption\nand in two lines", 0.5)]
    good = Row("good.png", best), str(tmp_path / "good.png")
    bad = Row("bad.png", [], "broken"), "bad.png"
    draw_grid([good, bad], tmp_path / "one.png")
    draw_grid([good, good], tmp_path / "two.png")
    sizes = [Image.open(tmp_path / f"{name}.png").size for name in ("one", "two")]
    assert sizes[0][0] < sizes[1][0]
    with pytest.raises(UserError, match="--grid"):
        draw_grid([bad], tmp_path / "none.png")


def test_a_device_that_is_not_here_is_refused_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("warp", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {name}"):
            choose_device(name)


def test_a_merge_that_changes_what_the_model_says_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As merging in half precision would (peft#2321); nothing is written."""
    classifier = _classifier()

    def careless(model: nn.Module) -> nn.Module:
        model.register_forward_hook(lambda _, __, output: SimpleNamespace(logits=output.logits * 1.01))
        return model

    monkeypatch.setattr(merge.adapters, "merge", careless)
    with pytest.raises(UserError, match=r"differs from the adapter by .*e-0[23].*--merge_tolerance 1\.0e-04"):
        merge.merge_to(classifier, tmp_path / "adapter", tmp_path / "out", _colors(tmp_path), 1e-4)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_links_to_itself_is_walked_once(tmp_path: Path) -> None:
    make_image(0, 0).save(tmp_path / "one.png")
    (tmp_path / "again").symlink_to(tmp_path)
    assert find_images([str(tmp_path)]) == [str(tmp_path / "one.png")]


def test_a_forward_pass_is_smaller_on_a_cpu_if_images_are_large_and_its_size_is_not_given() -> None:
    large, small, middle = (
        ImageTransforms(ViTImageProcessor(size={"height": side, "width": side})) for side in (384, 32, 160)
    )
    assert [choose_batch_size(None, torch.device(name), large) for name in ("cpu", "cuda:1", "mps")] == [8, 128, 32]
    assert [choose_batch_size(None, torch.device("cpu"), one) for one in (small, middle)] == [32, 15]
    assert choose_batch_size(100, torch.device("cpu"), large) == 100


@pytest.mark.parametrize(("size", "workers"), [(20, 0), (200, 1)])
def test_only_files_that_take_time_get_a_process_of_their_own(
    size: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process for tiny ones would take more from the model than it gives."""
    used = []

    class Watched(DataLoader):
        def __iter__(self) -> Any:
            used.append(self.num_workers)
            return super().__iter__()

    monkeypatch.setattr("lora_dist.processes.workers.DataLoader", Watched)
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "one.png")
    files = [str(tmp_path / f"{number}.png") for number in range(40)]
    for file in files:
        Path(file).hardlink_to(tmp_path / "one.png")
    rows = list(classify(_classifier(), files, Inference(torch.device("cpu"), batch_size=8), top_k=1))
    assert [row.path for row in rows] == files
    assert used == [workers]
