"""Models with code of their own that leaves weights without values when `transformers` loads them, or fails then."""

from pathlib import Path

import pytest
import torch
from lora_dist_testing.architectures import make_checkpoint
from lora_dist_testing.edits import edit_json, edit_tensors
from lora_dist_testing.tiny import make_remote_model
from torch import nn

from lora_dist.errors import UserError
from lora_dist.model.base.backbone import BaseOptions, load_base

LABELS = ["x", "y", "z"]


def _model(directory: Path, code: str) -> Path:
    """Writes a model of 2 classes with more code in its class."""
    make_remote_model(directory)
    file = directory / "remote.py"
    head, processor = file.read_text().split("class RemoteProcessor")
    file.write_text(f"import torch\n{head}{code}\nclass RemoteProcessor{processor}")
    return directory


def _base(directory: Path, labels: list[str], seed: int = 0) -> nn.Linear:
    options = BaseOptions(trust_remote_code=True, seed=seed, fit_classes=True)
    return load_base(str(directory), labels, options).model.classifier


def test_a_head_that_the_code_does_not_initialise_is_as_torch_initialises_it(tmp_path: Path) -> None:
    """It was what was in memory: other numbers in each process."""
    directory = _model(tmp_path, "    def _init_weights(self, module):\n        pass")
    before = _base(directory, ["x", "y"]).weight
    edit_json(directory / "config.json", id2label={"0": "p", "1": "q"}, label2id=None)
    assert torch.equal(_base(directory, ["p", "q"]).weight, before), "the head of the checkpoint"
    for labels in (LABELS, ["x", "y"]):
        head, again, other = (_base(directory, labels, seed) for seed in (3, 3, 4))
        assert head.weight.shape == (len(labels), 32)
        limit = 32**-0.5
        assert limit / 2 < head.weight.abs().max() <= limit
        assert head.bias.abs().max() <= limit
        assert torch.equal(head.weight, again.weight)
        assert not torch.equal(head.weight, other.weight)
        assert not torch.equal(head.weight[:2], before)


def test_a_weight_that_neither_checkpoint_nor_code_gives_values_is_refused(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "timm vit")
    edit_tensors(directory / "model.safetensors", lambda state: state.pop("pos_embed"))
    with pytest.raises(UserError, match=r"the checkpoint lacks timm_model\.pos_embed, or has it in another shape, and"):
        _base(directory, LABELS)


@pytest.mark.parametrize("values", ["torch.full((1,), 2.0)", "torch.arange(3)"])
def test_a_buffer_that_is_made_in_the_constructor_alone_is_named(values: str, tmp_path: Path) -> None:
    """`transformers` calls the constructor without memory; the model would compute with what is in it."""
    code = (
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        f"        self.register_buffer('scale', {values}, persistent=False)"
    )
    with pytest.raises(UserError, match="the code of RemoteModel gives scale no values when transformers loads it"):
        _base(_model(tmp_path, code), LABELS)
    assert torch.get_deterministic_debug_mode() == 0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "    from transformers.pytorch_utils import prune_heads",
            "does not run with the installed transformers: cannot",
        ),
        (
            "    def __init__(self, config):\n        super().__init__(config)\n        self.classifier.bias.tolist()",
            r"its constructor needs the values of tensors, and transformers calls it without memory",
        ),
    ],
)
def test_code_for_earlier_releases_is_refused_in_a_sentence(code: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        _base(_model(tmp_path, code), LABELS)
    assert "pip install" not in str(raised.value)


def test_code_of_a_backbone_alone_is_refused_without_a_question(tmp_path: Path) -> None:
    """`transformers` asked at a terminal whether to run the code, also with --trust_remote_code."""
    make_remote_model(tmp_path)
    edit_json(
        tmp_path / "config.json",
        auto_map={"AutoConfig": "remote.RemoteConfig", "AutoModel": "remote.RemoteModel"},
    )
    with pytest.raises(UserError, match=r"its code has no image classifier \(AutoModelForImageClassification"):
        _base(tmp_path, LABELS)
