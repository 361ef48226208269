"""Adapters of old releases: found under their old names, with their numbers, on every architecture."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.edits import edit_json
from lora_dist_testing.old_adapters import OLD, expected_of, logits
from lora_dist_testing.tiny import load_adapter, make_config, perturb
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageClassification, ViTImageProcessor

from lora_dist.errors import UserError
from lora_dist.model.base.backbone import BaseOptions, load_base
from lora_dist.model.lora import adapter_io, adapters
from lora_dist.model.lora.legacy_names import LegacyNames
from lora_dist.model.lora.trainable import make_trainable
from lora_dist.settings.train import LoraSettings, ModelSettings

FIXTURES = ("peft_0_2", "peft_0_2_biases", "peft_0_14", "peft_0_14_patterns")
LABELS = ["a", "b", "c"]


def base() -> Any:
    return load_base(str(OLD / "base"), LABELS).model


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    """The adapter of the guide's releases, to be changed."""
    return Path(shutil.copytree(OLD / "peft_0_2", tmp_path / "peft_0_2"))


@pytest.mark.parametrize("name", FIXTURES)
def test_an_adapter_of_an_old_release_gives_the_logits_it_gave_there(name: str) -> None:
    """Loaded, and merged; and it is no no-op there either."""
    expected = expected_of(OLD / name)
    model = load_adapter(base(), OLD / name)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(adapters.merge(model)), expected, rtol=1e-4, atol=1e-4)
    assert (expected - expected_of(OLD / name, "logits_without")).abs().max() > 0.5


def test_the_fixtures_are_what_they_are_said_to_be() -> None:
    keys = set(torch.load(OLD / "peft_0_2" / "adapter_model.bin", weights_only=True))
    assert "base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight" in keys
    assert "base_model.model.classifier.weight" in keys
    versions = {name: json.loads((OLD / name / "expected.json").read_text())["versions"] for name in FIXTURES}
    assert {(versions[name]["transformers"], versions[name]["peft"]) for name in FIXTURES} == {
        ("4.27.4", "0.2.0"),
        ("4.49.0", "0.14.0"),
    }


def test_nothing_is_said_of_settings_that_early_peft_wrote_and_nobody_uses(recwarn: pytest.WarningsRecorder) -> None:
    """`enable_lora: null`; PEFT itself warns of what it does not know."""
    load_adapter(base(), OLD / "peft_0_2")
    assert not [warning for warning in recwarn if "nexpected keyword" in str(warning.message)]


def test_keys_and_targets_may_be_of_different_generations(guide: Path) -> None:
    """Whoever read of the new names has renamed the targets, with which PEFT loads nothing at all."""
    edit_json(guide / "adapter_config.json", target_modules=["q_proj", "v_proj"])
    torch.testing.assert_close(logits(load_adapter(base(), guide)), expected_of(guide), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "option", [{"layers_to_transform": [1]}, {"exclude_modules": ["layer.0.attention.attention.query"]}]
)
def test_a_choice_of_layers_is_read_in_the_old_names(guide: Path, option: dict[str, Any]) -> None:
    """The keys of layers that are not chosen are then unexpected."""
    edit_json(guide / "adapter_config.json", **option)
    with pytest.raises(
        UserError, match=r"unexpected base_model\.model\.vit\.encoder\.layer\.0\.attention\.attention\.query\.lora_A"
    ):
        load_adapter(base(), guide)
    _change(
        guide,
        lambda state: {
            n: t for n, t in state.items() if "layer.0" not in n or ("exclude_modules" in option and "value" in n)
        },
    )
    changed = logits(load_adapter(base(), guide))
    assert (changed - expected_of(guide)).abs().max() > 0.01


def test_missing_left_over_and_misshaped_keys_are_listed_in_the_names_of_the_file(guide: Path) -> None:
    prefix = "base_model.model.vit.encoder.layer.1.attention.attention"

    def damage(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state[f"{prefix}.key.lora_A.weight"] = state.pop(f"{prefix}.query.lora_A.weight")
        state[f"{prefix}.value.lora_B.weight"] = state[f"{prefix}.value.lora_B.weight"][1:].contiguous()
        state["base_model.model.nowhere.lora_A.weight"] = torch.zeros(1)
        del state["base_model.model.classifier.bias"]
        return state

    _change(guide, damage)
    with pytest.raises(UserError) as caught:
        load_adapter(base(), guide)
    lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines[1:]] == [
        "missing base_model.model.classifier.bias",
        f"missing {prefix}.query.lora_A.weight",
        "unexpected base_model.model.nowhere.lora_A.weight",
        f"unexpected {prefix}.key.lora_A.weight",
        f"{prefix}.value.lora_B.weight is [15, 2] and should be [16, 2]",
    ]


def test_targets_that_are_nowhere_are_refused(guide: Path) -> None:
    edit_json(guide / "adapter_config.json", target_modules=["qkv"])
    with pytest.raises(UserError, match=r"does not fit ViTForImageClassification: it has no modules .*qkv"):
        load_adapter(base(), guide)


@pytest.mark.parametrize("form", ["classifier.modules_to_save", "classifier.original_module"])
def test_the_head_is_found_under_the_keys_of_every_release(guide: Path, form: str) -> None:
    """`original_module` is the head before training, which some releases saved as well."""

    def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
        for part in ("weight", "bias"):
            name = f"base_model.model.classifier.{part}"
            if form.endswith("original_module"):
                state[f"base_model.model.{form}.{part}"] = torch.zeros(2)
            else:
                state[f"base_model.model.{form}.{part}"] = state.pop(name)
        return state

    _change(guide, rename)
    torch.testing.assert_close(logits(load_adapter(base(), guide)), expected_of(guide), rtol=1e-5, atol=1e-5)


def test_two_different_heads_are_refused(guide: Path) -> None:
    name = "base_model.model.classifier.modules_to_save.bias"
    _change(guide, lambda state: {**state, name: torch.zeros(3)})
    with pytest.raises(UserError, match=r"two different tensors for classifier\.bias"):
        load_adapter(base(), guide)


class _Attack:
    def __reduce__(self) -> Any:
        return (print, ("code from the file was run",))


def test_a_pickle_runs_no_code(guide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"x": _Attack()}, guide / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin .*holds more than tensors.*safetensors") as caught:
        load_adapter(base(), guide)
    assert "Re-running" not in str(caught.value)
    assert "trusted" not in str(caught.value)
    assert "was run" not in capsys.readouterr().out


HOSTILE = {
    "protocol 2": pickle.dumps(_Attack(), 2),
    "protocol 4": pickle.dumps(_Attack(), 4),
    "pop empty": b"\x80\x02.",
    "pop": b"\x80\x020.",
    "memo": b"\x80\x02h\x05.",
    "long": b"\x80\x02\x8a\xff",
    "tuple": b"\x80\x02\x85.",
    "build": b"\x80\x02Nb.",
    "set item": b"\x80\x02}K\x01s.",
    "reduce": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "persistent id": b"\x80\x02K\x01Q.",
    "list": pickle.dumps([1]),
    "call": b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
    "zip": b"PK\x03\x04" + bytes(100),
    "tar": b"ustar" * 200,
    "magic number": b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})) + b"\x80\x02.",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_crafted_pickle_is_refused_in_words(content: bytes, guide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (guide / "adapter_model.bin").write_bytes(content)
    with pytest.raises(UserError, match="peft_0_2 is damaged"):
        adapter_io.read(guide)
    assert "was run" not in capsys.readouterr().out


def test_keys_that_are_no_names_are_refused(guide: Path) -> None:
    torch.save({7: torch.ones(1)}, guide / "adapter_model.bin")
    with pytest.raises(UserError, match="is not a dictionary of tensors"):
        adapter_io.read(guide)


@pytest.mark.parametrize("content", [b"", b"no pickle", [1, 2], {"x": 1}])
def test_a_pickle_of_something_else_is_refused(guide: Path, content: Any) -> None:
    if isinstance(content, bytes):
        (guide / "adapter_model.bin").write_bytes(content)
    else:
        torch.save(content, guide / "adapter_model.bin")
    with pytest.raises(UserError, match="is damaged"):
        load_adapter(base(), guide)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "type IA3; only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ],
)
def test_what_would_give_other_numbers_is_refused(guide: Path, change: dict[str, Any], words: str) -> None:
    edit_json(guide / "adapter_config.json", **change)
    with pytest.raises(UserError, match=words):
        load_adapter(base(), guide)


RENAMED = {
    "vit": ("vit.layers.1.attention.q_proj", "vit.encoder.layer.1.attention.attention.query"),
    "deit": ("deit.layers.0.attention.v_proj", "deit.encoder.layer.0.attention.attention.value"),
    "beit": ("beit.layers.0.attention.o_proj", "beit.encoder.layer.0.attention.output.dense"),
    "swin": ("swin.encoder.layers.1.blocks.0.attention.q_proj", "swin.encoder.layers.1.blocks.0.attention.self.query"),
    "swinv2": ("swinv2.encoder.layers.0.blocks.0.attention.self.query",) * 2,
    "dinov2": ("dinov2.encoder.layer.0.attention.k_proj", "dinov2.encoder.layer.0.attention.attention.key"),
    "convnext": ("convnext.encoder.stages.0.layers.0.pwconv1",) * 2,
    "resnet": ("resnet.encoder.stages.0.layers.0.layer.0.convolution",) * 2,
    "mobilevit": ("mobilevit.encoder.layer.2.transformer.layer.0.attention.attention.query",) * 2,
}


def test_every_part_of_every_architecture_has_an_old_name_of_its_own(architecture: Path) -> None:
    model = load_base(str(architecture), LABELS).model
    names = LegacyNames.of(model)
    assert names.parameters.keys() == model.state_dict().keys()
    assert len(set(names.parameters.values())) == len(names.parameters)
    current, old = RENAMED[architecture.name]
    assert names.modules[current] == old
    for form in (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".bias"):
        if f"{current}{form}" in names.parameters or "lora" in form:
            assert names.to_old(current + form) == old + form
            assert names.to_current(old + form) == current + form
    assert names.modules["classifier"] == "classifier"
    assert names.to_current("no.such.thing") == names.to_old("no.such.thing") == "no.such.thing"


def test_lora_in_the_model_makes_no_difference_to_the_names(vit: Path) -> None:
    base = load_base(str(vit), LABELS)
    names = LegacyNames.of(base.model)
    make_trainable(base, ModelSettings(), LoraSettings(lora_bias="all", use_dora=True))
    assert LegacyNames.of(base.model) == names


@pytest.mark.parametrize(
    "lora", [{}, {"use_dora": True, "lora_bias": "all", "lora_target_modules": ["query", "fc1"]}], ids=str
)
def test_an_adapter_renamed_to_the_old_names_loads_on_every_architecture(
    architecture: Path, lora: dict[str, Any], tmp_path: Path
) -> None:
    """The old names come from the checkpoint of the base, as old releases read it."""
    base = load_base(str(architecture), LABELS)
    if lora and architecture.name in ("convnext", "resnet"):
        lora = {"use_dora": True}
    trained = make_trainable(base, ModelSettings(), LoraSettings(lora_r=4, **lora))
    perturb(trained)
    size = 64 if architecture.name == "mobilevit" else 32
    expected = logits(trained, size)
    adapters.save_adapter(trained, tmp_path)
    renamed = _rename(tmp_path, LegacyNames.of(base.model))
    if architecture.name in ("vit", "deit", "beit", "swin", "dinov2"):
        assert not {key for key in renamed if ".q_proj." in key or ".v_proj." in key}
    found = load_adapter(load_base(str(architecture), LABELS, BaseOptions(seed=1)).model, tmp_path)
    torch.testing.assert_close(logits(found, size), expected)


def _rename(directory: Path, names: LegacyNames) -> dict[str, Tensor]:
    """Writes the weights of an adapter under old names, and returns them."""
    file = directory / "adapter_model.safetensors"
    plain = {adapter_io.plain_name(key): tensor for key, tensor in load_file(file).items()}
    renamed = {f"base_model.model.{names.to_old(name)}": tensor for name, tensor in plain.items() if name is not None}
    save_file(renamed, file)
    return renamed


@pytest.mark.parametrize(
    "option",
    [{"layers_to_transform": list(range(12)), "layers_pattern": "layer"}, {"exclude_modules": r".*\.layers\.0\..*"}],
    ids=str,
)
def test_what_chose_by_old_names_does_not_choose_again_by_new_ones(option: dict[str, Any], tmp_path: Path) -> None:
    """From twenty targets on, PEFT shortens the list of names, and asks about layers anew."""
    config = make_config("vit")
    config.num_hidden_layers = 12
    torch.manual_seed(0)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "deep")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "deep")
    base = load_base(str(tmp_path / "deep"), LABELS)
    trained = make_trainable(base, ModelSettings(), LoraSettings(lora_r=2))
    perturb(trained)
    adapters.save_adapter(trained, tmp_path)
    _rename(tmp_path, LegacyNames.of(base.model))
    edit_json(tmp_path / "adapter_config.json", target_modules=["query", "value"], **option)
    found = load_adapter(load_base(str(tmp_path / "deep"), LABELS).model, tmp_path)
    torch.testing.assert_close(logits(found, 32), logits(trained, 32))


def _change(directory: Path, change: Any) -> None:
    path = directory / "adapter_model.bin"
    torch.save(change(torch.load(path, weights_only=True)), path)
