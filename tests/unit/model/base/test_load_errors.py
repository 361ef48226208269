"""Why a base model cannot be loaded, and the way out."""

import shutil
from pathlib import Path

import pytest

from lora_dist.errors import UserError
from lora_dist.model.base.backbone import BaseOptions, load_base
from lora_dist.model.base.load_errors import cannot_load


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("./nowhere", "there is no such directory"),
        ("/no/where", "there is no such directory"),
        ("models/vit/best", "there is no such directory"),
        ("someone/nothing", "run `hf download someone/nothing` beforehand"),
    ],
)
def test_a_name_that_can_only_be_a_path_is_told_from_one_of_the_hub(name: str, part: str) -> None:
    message = str(cannot_load(name, OSError("what the client says")))
    assert part in message
    assert ("what the client says" in message) == (name == "someone/nothing")


def test_a_name_of_timm_is_answered_with_its_names_on_the_hub() -> None:
    pytest.importorskip("timm")
    names = ("vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224.no_such_tag")
    for name in names:
        message = str(cannot_load(name, OSError("what the client says")))
        assert "models of timm are called timm/vit_tiny_patch16_224.augreg_in21k" in message
    assert "timm" not in str(cannot_load("vit_of_nobody", OSError("what the client says")))


def test_advice_about_the_hub_is_for_errors_of_the_hub(vit: Path, tmp_path: Path) -> None:
    """Not for a model that is no classifier, and without the names of all that are."""
    shutil.copy(vit / "preprocessor_config.json", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="no image classifier of type bert") as caught:
        load_base(str(tmp_path), ["a", "b"], BaseOptions())
    assert "ViTConfig" not in str(caught.value)
    assert caught.value.__cause__ is not None
    for error in (caught.value.__cause__, OSError("a/b does not appear to have a file named config.json")):
        assert isinstance(error, Exception)
        message = str(cannot_load("a/b", error))
        assert "hf download" not in message
        assert "If it has moved" not in message


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ModuleNotFoundError("No module named 'no_such'", name="no_such.layers"), "pip install no_such"),
        (ImportError("This needs packages that were not found: a, b. Run `pip install a b`"), "pip install a b"),
        (ImportError("libcuda.so.1: cannot open"), "libcuda.so.1: cannot open"),
    ],
)
def test_an_import_that_fails_is_one_sentence(error: ImportError, line: str) -> None:
    assert str(cannot_load("org/name", error)) == f"the model 'org/name' needs a package that is not installed: {line}"
