"""The model card: valid metadata for the Hub, the numbers of the run, and any class name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_dist.model.base.license import License, license_of
from lora_dist.training.problems.single_label_problem import SingleLabel
from lora_dist.training.saving.model_card import MOST_CLASSES, ModelCard, Reference

RESULTS: dict[str, Any] = {
    "eval_accuracy": 0.87654,
    "eval_loss": 0.4321,
    "eval_samples": 1234,
    "train_samples": 75750,
    "trainable_params": 667493,
    "all_params": 86466149,
    "versions": {"torch": "9.9.9", "peft": "1.2.3"},
}


def card(labels: list[str], tuning: str = "lora", **more: Any) -> str:
    rows = [{"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "support": 40 + index} for index in range(len(labels))]
    given: dict[str, Any] = {
        "title": "food",
        "tuning": tuning,
        "base": Reference("google/vit", is_on_hub=True),
        "data": Reference("ethz/food101", is_on_hub=True),
        "problem": SingleLabel(),
        "labels": labels,
        "per_class": rows,
        "results": RESULTS,
        "settings": {"lora_r": 16, "lora_target_modules": ["query"]},
    }
    return str(ModelCard(**(given | more)))


def metadata(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))


def test_the_metadata_is_what_the_hub_reads() -> None:
    found = metadata(card(["a", "b"]))
    assert found["base_model"] == "google/vit"
    assert found["base_model_relation"] == "adapter"
    assert found["datasets"] == ["ethz/food101"]
    assert found["library_name"] == "peft"
    assert found["pipeline_tag"] == "image-classification"
    assert "lora" in found["tags"]
    result = found["model-index"][0]["results"][0]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.87654}]
    assert result["dataset"]["name"] == "ethz/food101"


def test_a_whole_model_is_no_adapter() -> None:
    text = card(["a", "b"], tuning="full")
    assert metadata(text)["library_name"] == "transformers"
    assert metadata(text)["base_model_relation"] == "finetune"
    assert "lora" not in metadata(text)["tags"]
    assert "--model THIS_DIRECTORY" in text
    assert "--adapter THIS_DIRECTORY" in card(["a", "b"])


def test_a_head_is_no_lora() -> None:
    text = card(["a", "b"], tuning="head")
    assert "A classification head for images of 2 classes" in text
    assert "lora" not in metadata(text)["tags"]
    assert metadata(text)["library_name"] == "peft"
    assert "--adapter THIS_DIRECTORY" in text


def test_the_numbers_of_the_run_are_in_it() -> None:
    text = card(["cat", "dog"])
    for part in ("0.8765", "0.4321", "1,234", "75,750", "667,493 of 86,466,149", "torch 9.9.9", "lora_r: 16"):
        assert part in text
    assert "eval_samples" not in text
    assert "| dog | 0.500 | 0.250 | 0.333 | 41 |" in text
    unknown = {"precision": float("nan"), "recall": 0.0, "f1": 0.0, "support": 0}
    assert "| rare |  | 0.000 | 0.000 | 0 |" in card(["rare"], per_class=[unknown])


@pytest.mark.parametrize(
    "name", ["a|b", "two\nlines", "<script>alert(1)</script>", "back\\slash", "äöü 🦊", "---", "*"]
)
def test_any_class_name_is_one_row_of_the_table(name: str) -> None:
    text = card([name, "other"])
    rows = [line for line in text.splitlines() if line.endswith("| 40 |")]
    assert len(rows) == 1
    assert len(rows[0].replace("\\\\", "").replace("\\|", "").split("|")) == 7
    assert "<script>" not in text
    assert metadata(text)["base_model"] == "google/vit"


@pytest.mark.parametrize("name", ["C:\\models\\vit", "my: model #1", "---", "a|b"])
def test_any_path_of_base_and_data_leaves_the_metadata_valid(name: str) -> None:
    """The Hub refuses a card whose `base_model` or `datasets` is a path."""
    text = card(["a"], base=Reference(name, False), data=Reference(name, False), title=name)
    found = metadata(text)
    assert not {"base_model", "base_model_relation", "datasets"} & found.keys()
    assert found["model-index"][0]["name"] == name
    assert found["model-index"][0]["results"][0]["dataset"] == {"name": name, "type": "imagefolder"}
    assert f"from `{name}`" in text


def test_a_card_on_the_hub_says_how_to_use_what_is_there() -> None:
    assert "--adapter ada/food --images" in card(["a"], name_on_hub="ada/food")
    assert "--model ada/food --images" in card(["a"], tuning="full", name_on_hub="ada/food")


def test_the_card_of_an_adapter_says_to_merge_it_for_pipeline() -> None:
    merging = "    python -m lora_dist.predict --adapter ada/food --merge_to merged/\n"
    assert merging in card(["a"], name_on_hub="ada/food")
    assert merging in card(["a"], tuning="head", name_on_hub="ada/food")
    assert "--merge_to" not in card(["a"], tuning="full", name_on_hub="ada/food")


def test_of_very_many_classes_the_first_are_listed() -> None:
    text = card([f"class {number}" for number in range(MOST_CLASSES + 7)])
    assert f"| class {MOST_CLASSES - 1} |" in text
    assert f"| class {MOST_CLASSES} |" not in text
    assert "… and 7 more." in text


def test_the_adapter_that_a_run_went_on_from_is_named() -> None:
    assert "from `google/vit`, continued from the adapter `runs/first/adapter`." in card(
        ["a"], start="runs/first/adapter"
    )
    assert "continued from" not in card(["a"])


def test_the_license_of_the_base_is_carried() -> None:
    restricting = License(
        "org/dino", {"license": "other", "license_name": "dinov3-license", "license_link": "https://x/y"}
    )
    text = card(["a", "b"], license_=restricting)
    assert metadata(text).items() >= restricting.metadata.items()
    assert "The base model `org/dino` has the license [dinov3-license](https://x/y)." in text
    assert "may restrict how this model is used" in text
    free = card(["a", "b"], license_=License("org/vit", {"license": "apache-2.0"}))
    assert metadata(free)["license"] == "apache-2.0"
    assert "has the license apache-2.0." in free
    assert "restrict" not in free
    assert "license" not in metadata(card(["a", "b"]))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("---\nlicense: cc-by-nc-4.0\ntags: [x]\n---\n# x\n", {"license": "cc-by-nc-4.0"}),
        ("---\nlicense: other\nlicense_name: x\nlicense_link: a.md\n---\n", {"license": "other", "license_name": "x"}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {"license": ["mit", "apache-2.0"]}),
        ("---\ntags: [x]\n---\n", None),
        ("# no metadata\n", None),
        ("---\nlicense: [\n---\n", None),
        (None, None),
    ],
)
def test_the_license_is_read_from_the_card_of_the_base(
    content: str | None, expected: dict[str, Any] | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "README.md").write_text(content)
    found = license_of(str(tmp_path), None, False)
    assert (found and found.metadata) == expected
    if expected is not None:
        assert found is not None
        assert ("may restrict" in "\n".join(found.section())) == (expected["license"] != ["mit", "apache-2.0"])
