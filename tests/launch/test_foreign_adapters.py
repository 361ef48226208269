"""The prediction command with adapters from elsewhere, with several, and what it writes for elsewhere."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.launching import flags, predict
from lora_dist_testing.old_adapters import OLD, expected_of, logits
from lora_dist_testing.tiny import make_folder, write_bundle
from safetensors.torch import load_file

from lora_dist.deployment.classify import Inference, classify
from lora_dist.model.lora.adapters import scale_update
from lora_dist.model.trained.classifier import load_classifier

GUIDE = ("--adapter", OLD / "peft_0_2", "--base_model", OLD / "base")


def _bundle(directory: Path, base_model: Path, labels: list[str], seed: int) -> Path:
    write_bundle(directory, base_model, labels, seed=seed, scale=0.5, lora_r=4)
    return directory


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images."""
    return make_folder(tmp_path_factory.mktemp("images"), per_class=1)


def _rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_guides_adapter_predicts_merges_and_goes_back(images: Path, tmp_path: Path) -> None:
    """Made by transformers 4.27 and PEFT 0.2: one command classifies with it, merges it and exports it."""
    (tmp_path / "labels.txt").write_text("rose\ntulip\ndaisy\n")
    result = predict(
        *GUIDE,
        *flags(
            class_names=tmp_path / "labels.txt",
            images=images,
            top_k=3,
            merge_to=tmp_path / "merged",
            export_legacy_names=tmp_path / "old",
        ),
    )
    assert "cannot check that" in result.stderr
    assert "exported to" in result.stderr
    rows = _rows(result.stdout)
    assert len(rows) == 3
    assert {entry["label"] for entry in rows[0]["top_k"]} == {"rose", "tulip", "daisy"}
    for arguments in (("--model", tmp_path / "merged"), ("--adapter", tmp_path / "old")):
        again = predict(*arguments, "--images", images, "--top_k", 3)
        assert again.stderr == ""
        for row, expected in zip(_rows(again.stdout), rows, strict=True):
            assert [entry["label"] for entry in row["top_k"]] == [entry["label"] for entry in expected["top_k"]]
            assert row["score"] == pytest.approx(expected["score"], abs=1e-5)
    merged = load_classifier(tmp_path / "merged")
    torch.testing.assert_close(logits(merged.model), expected_of(OLD / "peft_0_2"), rtol=1e-4, atol=1e-4)


def test_several_adapters_answer_each_for_itself(vit: Path, images: Path, tmp_path: Path) -> None:
    one = _bundle(tmp_path / "one", vit, ["cat", "dog"], 1)
    two = _bundle(tmp_path / "two", vit, ["up", "down", "left"], 2)
    result = predict("--adapter", f"pets={one}", two, "--images", images, "--top_k", 3)
    rows = _rows(result.stdout)
    assert [row["adapter"] for row in rows] == ["pets"] * 3 + [str(two)] * 3
    for name, alone in (("pets", one), (str(two), two)):
        expected = _rows(predict("--adapter", alone, "--images", images, "--top_k", 3).stdout)
        found = [
            {key: value for key, value in row.items() if key != "adapter"} for row in rows if row["adapter"] == name
        ]
        assert [row["path"] for row in found] == [row["path"] for row in expected]
        for row, other in zip(found, expected, strict=True):
            assert row["label"] == other["label"]
            assert row["score"] == pytest.approx(other["score"], abs=1e-6)
    (tmp_path / "bad.png").write_text("no image")
    bad = predict(
        "--adapter",
        f"a={one}",
        f"b={two}",
        "--images",
        tmp_path / "bad.png",
        images,
        "--output",
        tmp_path / "rows.csv",
        code=1,
    )
    assert "1 of 4 images could not be read" in bad.stderr
    with (tmp_path / "rows.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["adapter"] for row in table] == ["a"] * 4 + ["b"] * 4
    assert list(table[0]) == ["adapter", "path", "label", "score", "error"]


def test_a_weighted_merge_in_half_precision(vit: Path, images: Path, tmp_path: Path) -> None:
    labels = ["cat", "dog"]
    one, two = (_bundle(tmp_path / str(seed), vit, labels, seed) for seed in (1, 2))
    result = predict(
        "--adapter",
        f"day={one}",
        f"night={two}",
        "--weights",
        0.7,
        0.3,
        *flags(merge_to=tmp_path / "merged", dtype="bf16", images=images, export_legacy_names=tmp_path / "old"),
    )
    assert (tmp_path / "old" / "README.md").read_text().startswith("# 0.7 x day + 0.3 x night\n")
    assert "rounded to bf16" in result.stderr
    assert "adapter" not in _rows(result.stdout)[0]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "# 0.7 x day + 0.3 x night, merged" in card
    assert "rounded to bfloat16" in card
    state = load_file(tmp_path / "merged" / "model.safetensors")
    for seed, directory in ((1, one), (2, two)):
        predict("--adapter", directory, "--merge_to", tmp_path / f"alone {seed}")
    alone = [load_file(tmp_path / f"alone {seed}" / "model.safetensors") for seed in (1, 2)]
    for name, tensor in state.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), 0.7 * alone[0][name] + 0.3 * alone[1][name], rtol=1e-2, atol=1e-3)


def test_a_greedy_soup_is_merged_at_half_its_update(vit: Path, images: Path, tmp_path: Path) -> None:
    """Two of the adapters are one and the same, by whose answers the images are sorted; the third is worse."""
    one, other = _bundle(tmp_path / "1", vit, ["cat", "dog"], 1), tmp_path / "2"
    write_bundle(other, vit, ["cat", "dog"], seed=2, scale=5, lora_r=4)
    files = [str(file) for file in sorted(images.rglob("*.png"))]
    rows = classify(load_classifier(one), files, Inference(torch.device("cpu"), batch_size=8, num_workers=0), top_k=1)
    for number, row in enumerate(rows):
        sorted_to = tmp_path / "validation" / row.top_k[0][0] / f"{number}.png"
        sorted_to.parent.mkdir(parents=True, exist_ok=True)
        sorted_to.write_bytes(Path(row.path).read_bytes())
    result = predict(
        *("--adapter", f"other={other}", f"one={one}", f"again={one}", "--greedy_soup", tmp_path / "validation"),
        *flags(adapter_scale=0.5, merge_to=tmp_path / "merged"),
    )
    assert "greedy soup of one, again: 100.00%" in result.stderr
    assert "left out: other" in result.stderr
    assert "# 0.5 x one + 0.5 x again, LoRA scaled by 0.5, merged" in (tmp_path / "merged" / "README.md").read_text()
    half = load_classifier(one).model
    scale_update(half, 0.5)
    torch.testing.assert_close(logits(load_classifier(tmp_path / "merged").model, 32), logits(half, 32))
