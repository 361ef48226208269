"""LoRA on every architecture: where it goes, that it comes back from disk exactly, and that merging keeps it."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.edits import edit_json, edit_tensors
from lora_dist_testing.tiny import load_adapter, make_image, make_model, perturb
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import Base, BaseOptions, load_base
from lora_dist.model.lora import adapters, injection, parameter_names
from lora_dist.model.lora.targets import resolve_targets
from lora_dist.model.lora.trainable import make_trainable
from lora_dist.settings.train import LoraSettings, ModelSettings, OptimizationSettings
from lora_dist.training.optimizer import make_optimizer

LABELS = ["x", "y", "z"]
ATTENTION = ("vit", "deit", "beit", "swin", "swinv2", "dinov2", "mobilevit")
OLD_NAMES = ("swinv2", "mobilevit")
AUTO = {
    "convnext": {"pwconv1", "pwconv2"},
    "resnet": {"convolution"},
    **{name: {"query", "value"} if name in OLD_NAMES else {"q_proj", "v_proj"} for name in ATTENTION},
}


def _base(directory: Path, seed: int = 0) -> Base:
    return load_base(str(directory), LABELS, BaseOptions(seed=seed))


def _targets(base: Base, *names: str) -> set[str]:
    """Full names of the modules that these targets adapt, as PEFT understands the answer."""
    wanted = resolve_targets(base.model, names, base.heads)
    return {
        name
        for name, _ in base.model.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in wanted)
    }


@torch.inference_mode()
def _logits(model: Any, base: Base) -> Tensor:
    images = [make_image(label, number) for label in range(3) for number in range(2)]
    return model.eval()(pixel_values=ImageTransforms(base.processor).batch(images)).logits


def _trained(directory: Path, model: ModelSettings | None = None, **lora: Any) -> tuple[Any, Base]:
    """A model with an adapter that has been moved away from its start, and the base it stands on."""
    base = _base(directory)
    trained = make_trainable(base, model or ModelSettings(), LoraSettings(lora_r=4, lora_alpha=8, **lora))
    perturb(trained)
    return trained, base


def _read_by_peft(base: Path, adapter: Path) -> Any:
    plain = AutoModelForImageClassification.from_pretrained(
        base, num_labels=3, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    return PeftModel.from_pretrained(plain, adapter)


def _without_lora(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter_names.is_lora_b(name):
                parameter.zero_()


def test_auto_adapts_what_is_usual_for_the_architecture(architecture: Path) -> None:
    base = _base(architecture)
    last = {name.rpartition(".")[2] for name in _targets(base, "auto")}
    assert last == AUTO[architecture.name]
    assert not any(name.startswith("classifier") for name in _targets(base, "auto"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["query", "value"], ["q_proj", "v_proj"]),
        (["key"], ["k_proj"]),
        (["attention.output.dense"], ["o_proj"]),
        (["intermediate.dense"], ["fc1"]),
    ],
)
def test_names_of_both_generations_of_transformers_mean_the_same(
    architecture: Path, old: Sequence[str], new: Sequence[str]
) -> None:
    base = _base(architecture)
    if architecture.name not in ATTENTION:
        for names in (old, new):
            with pytest.raises(UserError, match=names[0]):
                _targets(base, *names)
        return
    found = _targets(base, *new)
    assert found
    assert _targets(base, *old) == found
    kept = old if architecture.name in OLD_NAMES else new
    assert {name for name in found if any(name.endswith(f".{suffix}") for suffix in kept)} == found


@pytest.mark.parametrize("name", ["swinv2", "mobilevit"])
def test_the_second_layer_of_the_mlp_is_not_the_output_of_the_attention(name: str, tmp_path: Path) -> None:
    """`output.dense` ends the names of both; the new name means one of them."""
    base = _base(make_model(tmp_path / name, name))
    found = _targets(base, "fc2")
    assert found
    assert not found & _targets(base, "o_proj")


def test_a_target_that_does_not_exist_is_answered_with_those_that_do(architecture: Path) -> None:
    base = _base(architecture)
    with pytest.raises(UserError) as caught:
        resolve_targets(base.model, ["no_such_layer"], base.heads)
    message = str(caught.value)
    assert "no_such_layer" in message
    assert type(base.model).__name__ in message
    assert "auto" in message
    for name in {target.rpartition(".")[2] for target in _targets(base, "auto")}:
        assert name in message
    assert "classifier" not in message


def test_the_head_is_no_target(vit: Path) -> None:
    with pytest.raises(UserError, match="classifier"):
        resolve_targets(_base(vit).model, ["classifier"], ["classifier"])


def test_all_linear_adapts_every_linear_layer_but_the_head(architecture: Path) -> None:
    base = _base(architecture)
    linear = {
        name
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("classifier")
    }
    if linear:
        assert _targets(base, "all-linear") == linear
    else:
        with pytest.raises(UserError, match=r"no linear layer.*use auto"):
            _targets(base, "all-linear")


def test_exactly_the_adapter_and_the_head_train(architecture: Path) -> None:
    base = _base(architecture)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    targets = _targets(base, "auto")
    model = make_trainable(base, ModelSettings(), LoraSettings(lora_r=4))
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lora = {f"base_model.model.{target}.lora_{matrix}.default.weight" for target in targets for matrix in ("A", "B")}
    head = {
        f"base_model.model.classifier.modules_to_save.default{name.removeprefix('classifier')}"
        for name in before
        if name.startswith("classifier")
    }
    assert training == lora | head
    perturb(model)
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name and "classifier" not in name
    }
    assert after.keys() == {name for name in before if not name.startswith("classifier")}
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name


def test_plain_peft_and_load_adapter_give_the_logits_of_the_trained_model(architecture: Path, tmp_path: Path) -> None:
    trained, base = _trained(architecture)
    expected = _logits(trained, base)
    adapters.save_adapter(trained, tmp_path)
    torch.testing.assert_close(_logits(_read_by_peft(architecture, tmp_path), base), expected)
    loaded = load_adapter(_base(architecture, seed=1).model, tmp_path)
    torch.testing.assert_close(_logits(loaded, base), expected)
    assert not loaded.training
    _without_lora(trained)
    assert (_logits(trained, base) - expected).abs().max() > 1e-2, "the adapter was a no-op and proves nothing"


def test_merged_is_adapter_is_reloaded_and_is_not_the_base(architecture: Path, tmp_path: Path) -> None:
    trained, base = _trained(architecture)
    expected = _logits(trained, base)
    unadapted, _ = _trained(architecture)
    _without_lora(unadapted)
    merged = adapters.merge(trained)
    assert not any(".lora_" in name or "modules_to_save" in name for name in merged.state_dict())
    torch.testing.assert_close(_logits(merged, base), expected, rtol=1e-4, atol=1e-4)
    assert (_logits(unadapted, base) - expected).abs().max() > 1e-2
    merged.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(_logits(reloaded, base), expected, rtol=1e-4, atol=1e-4)


VARIANTS: list[dict[str, Any]] = [
    {"use_dora": True},
    {"use_rslora": True},
    {"lora_bias": "all"},
    {"lora_bias": "lora_only"},
    {"init_lora_weights": "gaussian"},
    {"use_dora": True, "use_rslora": True, "lora_bias": "all"},
    {"layers_to_transform": "last:1", "train_norms": True},
]
TARGETS: list[dict[str, Any]] = [
    {"lora_target_modules": names}
    for names in (["all-linear"], ["layers.1.attention.q_proj"], ["query", "fc2", "projection"])
] + [
    {"lora_rank_pattern": {"query": 2}, "lora_alpha_pattern": {r".*\.1\..*": 3}, "use_rslora": True},
    {"init_lora_weights": "orthogonal", "layers_to_transform": [1]},
    {"train_norms": True, "lora_bias": "lora_only", "use_dora": True},
    {"train_norms": True, "lora_bias": "all"},
]


@pytest.mark.parametrize(
    ("name", "lora"),
    [*((name, lora) for name in ("vit", "swinv2", "convnext", "resnet") for lora in VARIANTS)]
    + [("vit", lora) for lora in TARGETS],
    ids=str,
)
def test_variants_of_lora_come_back_and_merge(name: str, lora: dict[str, Any], tmp_path: Path) -> None:
    directory = make_model(tmp_path / name, name)
    trained, base = _trained(directory, **lora)
    expected = _logits(trained, base)
    adapters.save_adapter(trained, tmp_path / "adapter")
    loaded = load_adapter(_base(directory, seed=1).model, tmp_path / "adapter")
    torch.testing.assert_close(_logits(loaded, base), expected)
    torch.testing.assert_close(_logits(adapters.merge(loaded), base), expected, rtol=1e-4, atol=1e-4)


def test_dora_trains_magnitudes_and_rslora_scales_by_the_root_of_the_rank(vit: Path) -> None:
    dora, _ = _trained(vit, use_dora=True)
    assert any("lora_magnitude_vector" in name for name, tensor in dora.named_parameters() if tensor.requires_grad)
    rslora, _ = _trained(vit, use_rslora=True)
    plain, _ = _trained(vit)
    scaling = [
        next(module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer))
        for model in (rslora, plain)
    ]
    assert scaling == [8 / 4**0.5, 8 / 4]


@pytest.mark.parametrize(("bias", "elsewhere"), [("none", False), ("lora_only", False), ("all", True)])
def test_biases_train_as_asked(bias: str, elsewhere: bool, vit: Path) -> None:
    model, _ = _trained(vit, lora_bias=bias)
    training = {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.endswith(".bias") and "classifier" not in name
    }
    assert any(".q_proj." in name for name in training) == (bias != "none")
    assert any(".fc1." in name for name in training) == elsewhere
    assert any(".k_proj." in name for name in training) == elsewhere


PATTERNS: dict[str, Any] = {"lora_rank_pattern": {"layers.1.attention.q_proj": 2}, "lora_alpha_pattern": {"v_proj": 3}}


@pytest.mark.parametrize(
    "more",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": "all"}, PATTERNS, PATTERNS | {"use_rslora": True}],
    ids=str,
)
def test_pissa_is_handed_over_as_plain_lora_on_the_unchanged_base(
    more: dict[str, Any], vit: Path, tmp_path: Path
) -> None:
    base = _base(vit)
    fresh = _logits(base.model, base)
    model = make_trainable(base, ModelSettings(), LoraSettings(lora_r=4, init_lora_weights="pissa", **more))
    assert adapters.mutates_base(model)
    torch.testing.assert_close(_logits(model, base), fresh, rtol=1e-4, atol=1e-4)
    adapters.save_adapter(model, tmp_path / "initial")
    perturb(model)
    expected = _logits(model, base)
    initial = {path.name: path.read_bytes() for path in (tmp_path / "initial").iterdir()}
    adapters.save_adapter(model, tmp_path / "adapter", initial=tmp_path / "initial")
    assert {path.name: path.read_bytes() for path in (tmp_path / "initial").iterdir()} == initial
    torch.testing.assert_close(_logits(model, base), expected)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == 8
    peft = _read_by_peft(vit, tmp_path / "adapter")
    torch.testing.assert_close(_logits(peft, base), expected, rtol=1e-4, atol=1e-4)
    loaded = load_adapter(_base(vit, seed=1).model, tmp_path / "adapter")
    torch.testing.assert_close(_logits(loaded, base), expected, rtol=1e-4, atol=1e-4)


def test_plain_lora_does_not_change_the_base(vit: Path) -> None:
    assert not adapters.mutates_base(_trained(vit)[0])


def test_pissa_on_convolutions_is_refused_in_words(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "resnet", "resnet")
    with pytest.raises(UserError, match=r"init_lora_weights.*pissa"):
        _trained(directory, init_lora_weights="pissa")


def test_a_linear_probe_comes_back_and_merges(architecture: Path, tmp_path: Path) -> None:
    trained, base = _trained(architecture, ModelSettings(tuning="head"))
    assert all("classifier" in name for name, parameter in trained.named_parameters() if parameter.requires_grad)
    expected = _logits(trained, base)
    adapters.save_adapter(trained, tmp_path)
    assert all("classifier" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    other = _base(architecture, seed=1)
    assert (_logits(other.model, base) - expected).abs().max() > 1e-2
    loaded = load_adapter(other.model, tmp_path)
    torch.testing.assert_close(_logits(loaded, base), expected)
    torch.testing.assert_close(_logits(adapters.merge(loaded), base), expected)


@pytest.fixture
def saved(vit: Path, tmp_path: Path) -> Path:
    """An adapter on disk, to be damaged."""
    trained, _ = _trained(vit)
    adapters.save_adapter(trained, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_missing_left_over_and_misshaped_keys_are_listed(saved: Path, vit: Path) -> None:
    prefix = "base_model.model."
    missing = f"{prefix}vit.layers.0.attention.q_proj.lora_A.weight"
    misshaped = f"{prefix}vit.layers.1.attention.v_proj.lora_B.weight"
    head = f"{prefix}classifier.weight"

    def damage(state: dict[str, Tensor]) -> None:
        state[f"{prefix}foreign.lora_A.weight"] = state.pop(missing)
        state[misshaped] = state[misshaped][:-1].contiguous()
        state.pop(head)

    edit_tensors(saved / "adapter_model.safetensors", damage)
    with pytest.raises(UserError) as caught:
        load_adapter(_base(vit).model, saved)
    message = str(caught.value)
    assert f"missing {missing}" in message
    assert f"missing {head}" in message
    assert f"unexpected {prefix}foreign.lora_A.weight" in message
    assert f"{misshaped} is [31, 4] and should be [32, 4]" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named_with_their_file(value: float, saved: Path, vit: Path) -> None:
    """An adapter of a training that diverged would predict something for every image."""
    name = "base_model.model.vit.layers.1.attention.v_proj.lora_B.weight"
    edit_tensors(saved / "adapter_model.safetensors", lambda state: state[name].view(-1)[3:4].fill_(value))
    with pytest.raises(UserError, match=rf"is damaged: {name} in adapter_model\.safetensors is not finite"):
        load_adapter(_base(vit).model, saved)


def test_an_adapter_of_another_number_of_classes_is_refused(saved: Path, vit: Path) -> None:
    with pytest.raises(UserError, match=r"classifier\.weight is \[3, 32\] and should be \[2, 32\]"):
        load_adapter(load_base(str(vit), ["x", "y"]).model, saved)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_or_damaged_file_is_named(name: str, saved: Path, vit: Path) -> None:
    (saved / name).write_bytes(b"{ no")
    with pytest.raises(UserError, match=f"{saved.name} is damaged"):
        load_adapter(_base(vit).model, saved)
    if name == "adapter_model.safetensors":
        (saved / name).write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS"):
            load_adapter(_base(vit).model, saved)
    (saved / name).unlink()
    with pytest.raises(UserError, match=f"no {name}"):
        load_adapter(_base(vit).model, saved)


@pytest.mark.parametrize(
    "changed",
    [
        {"r": "x"},
        {"r": -1},
        {"r": 10**9},
        {"target_modules": 5},
        {"target_modules": None},
        {"target_modules": "(((("},
        {"modules_to_save": 7},
        {"lora_alpha": "q"},
        {"rank_pattern": [1]},
        {"peft_type": None},
        {"bias": "zzz"},
        {"use_dora": True},
        {"layers_pattern": 3},
        {"megatron_config": {"a": 1}},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_refused(changed: dict[str, Any], saved: Path, vit: Path) -> None:
    edit_json(saved / "adapter_config.json", **changed)
    with pytest.raises(UserError, match=re.escape(str(saved))):
        load_adapter(_base(vit).model, saved)


def test_an_empty_tensor_is_not_saved(vit: Path, tmp_path: Path) -> None:
    """What is left of a sharded parameter that was not gathered must not pass for an adapter (peft#2892)."""
    model, _ = _trained(vit)
    name, parameter = next((name, tensor) for name, tensor in model.named_parameters() if ".lora_A." in name)
    parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match=name.replace(".default", "")):
        adapters.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_that_is_not_finite_is_not_merged(vit: Path) -> None:
    model, _ = _trained(vit)
    broken = next(tensor for name, tensor in model.named_parameters() if ".lora_B." in name)
    broken.data.fill_(float("nan"))
    with pytest.raises(UserError, match="cannot be merged"):
        adapters.merge(model)


def test_several_adapters_stand_side_by_side(architecture: Path, tmp_path: Path) -> None:
    """Of other ranks, targets and numbers of classes; each gives its own logits whenever it is the active one."""
    kinds: list[dict[str, Any]] = [
        {"lora_r": 4},
        {"lora_r": 2, "use_rslora": True, "train_norms": True},
        {"use_dora": True},
    ]
    classes = [["x", "y", "z"], ["x", "y", "z"], ["p", "q", "r", "s", "t"]]
    expected = []
    for number, (kind, labels) in enumerate(zip(kinds, classes, strict=True)):
        base = load_base(str(architecture), labels)
        trained = make_trainable(base, ModelSettings(), LoraSettings(**kind))
        perturb(trained, seed=number)
        expected.append(_logits(trained, base))
        adapters.save_adapter(trained, tmp_path / str(number))
    base = _base(architecture, seed=1)
    model: Any = base.model
    for number, labels in enumerate(classes):
        model = load_adapter(model, tmp_path / str(number), f"adapter_{number}", len(labels))
    for number in (0, 2, 1, 2, 0):
        adapters.activate(model, f"adapter_{number}")
        torch.testing.assert_close(_logits(model, base), expected[number])
    adapters.activate(model, "adapter_2")
    torch.testing.assert_close(_logits(adapters.merge(model), base), expected[2], rtol=1e-4, atol=1e-4)


def test_a_second_adapter_is_loaded_as_strictly_as_the_first(saved: Path, vit: Path) -> None:
    model = load_adapter(_base(vit).model, saved, "first")
    edit_tensors(
        saved / "adapter_model.safetensors",
        lambda state: state.pop("base_model.model.vit.layers.1.attention.v_proj.lora_A.weight"),
    )
    with pytest.raises(UserError, match=r"missing .*layers\.1\.attention\.v_proj\.lora_A"):
        load_adapter(model, saved, "third", num_labels=3)


def test_saving_twice_gives_the_same_bytes(vit: Path, tmp_path: Path) -> None:
    model, _ = _trained(vit)
    for name in ("first", "second"):
        adapters.save_adapter(model, tmp_path / name)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_an_adapter_loads_from_wherever_it_was_moved(saved: Path, vit: Path, tmp_path: Path) -> None:
    base = _base(vit)
    expected = _logits(load_adapter(_base(vit, seed=1).model, saved), base)
    shutil.move(saved, tmp_path / "moved")
    torch.testing.assert_close(_logits(load_adapter(base.model, tmp_path / "moved"), base), expected)


def test_patterns_chosen_blocks_and_norms_are_what_plain_peft_loads(vit: Path, tmp_path: Path) -> None:
    lora: dict[str, Any] = {
        "layers_to_transform": "last:1",
        "train_norms": True,
        "lora_target_modules": ["q_proj", "fc1"],
    }
    trained, base = _trained(vit, lora_rank_pattern={"query": 2}, lora_alpha_pattern={"fc1": 5}, **lora)
    layers = {name: module for name, module in trained.named_modules() if isinstance(module, LoraLayer)}
    found = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in layers.items()
    }
    assert found == {"vit.layers.1.attention.q_proj": (2, 8 / 2), "vit.layers.1.mlp.fc1": (4, 5 / 4)}
    norms = {
        name.partition(".modules_to_save")[0]
        for name, one in trained.named_parameters()
        if one.requires_grad and "norm" in name
    }
    assert len(norms) == 5
    adapters.save_adapter(trained, tmp_path)
    expected = _logits(trained, base)
    loaded = _read_by_peft(vit, tmp_path)
    torch.testing.assert_close(_logits(loaded, base), expected)
    with torch.no_grad():
        for name, one in loaded.named_parameters():
            if "norm" in name and ".modules_to_save." in name:
                one.fill_(1.0)
    assert (_logits(loaded, base) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (
            {"lora_rank_pattern": {"fc1": 2}},
            "--lora_rank_pattern fc1: no layer with LoRA has such a name; they are vit",
        ),
        ({"lora_alpha_pattern": {"(q": 2}}, r"--lora_alpha_pattern \(q: not a regular expression"),
        ({"layers_to_transform": "last:3"}, "the model has 2 blocks, 0 to 1"),
        ({"layers_to_transform": [2]}, "the model has 2 blocks, 0 to 1"),
        (
            {"layers_to_transform": [0], "lora_target_modules": ["layers.1.attention.q_proj"]},
            "no layer to adapt is inside",
        ),
    ],
    ids=str,
)
def test_names_and_blocks_that_do_not_exist_are_refused(lora: dict[str, Any], words: str, vit: Path) -> None:
    with pytest.raises(UserError, match=words):
        _trained(vit, **lora)


def test_an_orthogonal_start_changes_nothing_and_is_for_linear_layers(vit: Path, tmp_path: Path) -> None:
    base = _base(vit)
    before = _logits(base.model, base)
    model = make_trainable(base, ModelSettings(), LoraSettings(lora_r=4, init_lora_weights="orthogonal"))
    assert all(one.abs().max() > 0 for name, one in model.named_parameters() if ".lora_" in name)
    torch.testing.assert_close(_logits(model, base), before)
    resnet = _base(make_model(tmp_path / "resnet", "resnet"))
    for init in ("orthogonal", "pissa"):
        with pytest.raises(UserError, match=f"{init} supports linear layers only"):
            make_trainable(resnet, ModelSettings(), LoraSettings.model_validate({"init_lora_weights": init}))


def test_lora_plus_the_head_and_weight_decay_make_groups(architecture: Path) -> None:
    base = _base(architecture)
    model = make_trainable(base, ModelSettings(), LoraSettings(lora_r=4))
    settings = OptimizationSettings(weight_decay=0.1, learning_rate=0.01, head_learning_rate=0.03)
    optimizer = make_optimizer(model, settings, 16.0, base.heads)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            ratio = 16.0 if ".lora_B." in name else 3.0 if "modules_to_save" in name else 1.0
            assert group["lr_ratio"] == pytest.approx(ratio), name
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0), name
    assert sorted(seen) == sorted(name for name, tensor in model.named_parameters() if tensor.requires_grad)
    assert len({group["lr_ratio"] for group in optimizer.param_groups}) == 3
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


def test_the_head_of_a_model_trained_in_full_has_its_own_learning_rate(vit: Path) -> None:
    base = _base(vit)
    model = make_trainable(base, ModelSettings(tuning="full"), LoraSettings())
    settings = OptimizationSettings(learning_rate=0.01, head_learning_rate=0.1)
    groups = make_optimizer(model, settings, 1.0, base.heads).param_groups
    ratios = {id(parameter): group["lr_ratio"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert ratios[id(parameter)] == pytest.approx(10 if name.startswith("classifier.") else 1), name


def test_without_lora_a_pass_is_that_of_the_base_and_goes_back_as_far(vit: Path) -> None:
    base = _base(vit)
    model = make_trainable(base, ModelSettings(), LoraSettings(lora_r=4, lora_dropout=0))
    perturb(model)
    heads = [parameter for name, parameter in model.named_parameters() if "modules_to_save" in name]
    plain = _base(vit).model
    for own, head in zip(plain.classifier.parameters(), heads, strict=True):
        own.data = head.data
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    pixels = torch.randn(2, 3, 32, 32)
    first = next(module for module in model.modules() if isinstance(module, LoraLayer))
    reached: list[Tensor] = []
    before = model(pixel_values=pixels).logits
    with injection.without_lora(model):
        hook = first.register_forward_hook(lambda _module, _inputs, output: reached.append(output))
        logits = model(pixel_values=pixels).logits
        logits.sum().backward()
    hook.remove()
    torch.testing.assert_close(logits, plain(pixel_values=pixels).logits)
    assert not torch.allclose(logits, before, rtol=1e-2)
    (output,) = reached
    assert output.grad is not None
    assert output.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in heads)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora_" in name)
    torch.testing.assert_close(model(pixel_values=pixels).logits, before)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
