"""The classifier: what of it trains, in which precision, what the base is recognised by, and memory savers."""

import importlib.util
import logging
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.edits import edit_json, edit_tensors
from lora_dist_testing.tiny import load_adapter, make_image, make_model, perturb, write_bundle
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForMaskedImageModeling,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import Base, BaseOptions, load_base
from lora_dist.model.base.head import find_heads, fingerprint
from lora_dist.model.lora import adapters, parameter_names
from lora_dist.model.lora.trainable import count_parameters, load_trained, make_trainable, set_training, trained_tensors
from lora_dist.model.trained.warm_start import load_warm_start
from lora_dist.settings.train import LoraSettings, ModelSettings, Settings

LABELS = ["x", "y", "z"]
LORA = LoraSettings(lora_r=4, lora_dropout=0.0)
WITHOUT_CHECKPOINTING = ("convnext", "resnet")


def _base(directory: Path, labels: list[str] = LABELS, **more: Any) -> Base:
    return load_base(str(directory), labels, BaseOptions(**more))


def _pixels(base: Base) -> Tensor:
    return ImageTransforms(base.processor).batch([make_image(label, number) for label in range(3) for number in (0, 1)])


def _loss(model: nn.Module, base: Base) -> Tensor:
    return cross_entropy(model(pixel_values=_pixels(base)).logits, torch.tensor([0, 0, 1, 1, 2, 2]))


def _step(model: nn.Module, base: Base) -> dict[str, Tensor]:
    """Gradients of one loss, without dropout, with batch norms in the mode of training."""
    set_training(model)
    torch.manual_seed(0)
    _loss(model, base).backward()
    return {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}


def _training(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_head_is_found(architecture: Path) -> None:
    base = _base(architecture)
    assert base.heads == ["classifier"]
    assert base.model.config.id2label == dict(enumerate(LABELS))
    assert base.model.config.label2id == {"x": 0, "y": 1, "z": 2}
    assert base.model(pixel_values=_pixels(base)).logits.shape == (6, 3)


def test_a_model_without_a_head_is_refused() -> None:
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    with pytest.raises(UserError, match="no head"):
        find_heads(ViTModel(config, add_pooling_layer=False))


def test_full_tuning_trains_everything_and_a_probe_only_the_head(architecture: Path) -> None:
    whole = make_trainable(_base(architecture), ModelSettings(tuning="full"), LORA)
    frozen = {name for name, parameter in whole.named_parameters() if not parameter.requires_grad}
    # The mask token takes no part in classification: DDP would wait for its gradient for ever.
    assert frozen == ({"dinov2.embeddings.mask_token"} if architecture.name == "dinov2" else set())
    probe = make_trainable(_base(architecture), ModelSettings(tuning="head"), LORA)
    assert {name.split(".")[2] for name in _training(probe)} == {"classifier"}
    head = [parameter for name, parameter in whole.named_parameters() if name.startswith("classifier")]
    assert count_parameters(probe) == (
        sum(parameter.numel() for parameter in head),
        sum(parameter.numel() for parameter in whole.parameters()),
    )


@pytest.mark.parametrize("tuning", ["lora", "head", "full"])
def test_everything_that_trains_gets_a_gradient_and_nothing_else_does(architecture: Path, tuning: Any) -> None:
    base = _base(architecture)
    model = make_trainable(base, ModelSettings(tuning=tuning), LORA)
    assert all(parameter.grad is None for parameter in model.parameters())
    gradients = _step(model, base)
    assert gradients.keys() == _training(model)
    # The A matrices get their first gradient once B has moved away from zero.
    dead = {name for name, gradient in gradients.items() if not gradient.any() and ".lora_A." not in name}
    # A shift of all keys changes no attention, and over the single token of MobileViT's last stage nothing does.
    assert all(".k_proj." in name or ".key." in name or ".query." in name for name in dead), dead


def test_vit_base_with_101_classes_has_the_parameters_of_the_guide(tmp_path: Path) -> None:
    """The PEFT guide "Image classification using LoRA" reports these counts; the head counts once."""
    config = ViTConfig()
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path / "base")
    ViTImageProcessor().save_pretrained(tmp_path / "base")
    base = _base(tmp_path / "base", [f"food {number}" for number in range(101)], init_from_config=True)
    model = make_trainable(base, ModelSettings(), LoraSettings())
    assert count_parameters(model) == (667_493, 86_466_149)
    adapters.save_adapter(model, tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size == pytest.approx(2_676_372, rel=0.02)


@pytest.mark.parametrize("tuning", ["lora", "head", "full"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_trains_in_fp32(vit: Path, tmp_path: Path, tuning: Any, dtype: Any) -> None:
    model = AutoModelForImageClassification.from_pretrained(vit, dtype=torch.float32).to(dtype)
    model.save_pretrained(tmp_path)
    shutil.copy(vit / "preprocessor_config.json", tmp_path)
    assert load_file(tmp_path / "model.safetensors")["classifier.weight"].dtype == dtype
    trainable = make_trainable(_base(tmp_path), ModelSettings(tuning=tuning), LORA)
    assert {parameter.dtype for parameter in trainable.parameters()} == {torch.float32}


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_buffers() if "running_" in name or "num_batch" in name}


@pytest.mark.parametrize(
    ("tuning", "bias", "move"),
    [("lora", "none", False), ("head", "none", False), ("lora", "all", False), ("full", "none", True)],
)
def test_batch_norm_statistics_move_where_the_batch_norm_trains(
    tmp_path: Path, tuning: Any, bias: Any, move: bool
) -> None:
    base = _base(make_model(tmp_path / "resnet", "resnet"))
    model = make_trainable(base, ModelSettings(tuning=tuning), LORA.model_copy(update={"lora_bias": bias}))
    before = _statistics(model)
    assert before
    _step(model, base)
    after = _statistics(model)
    assert all(torch.equal(after[name], before[name]) != move for name in before)
    assert all(name in dict(trained_tensors(model)) for name in before) == move


def test_the_statistics_of_other_frozen_norms_stay(tmp_path: Path) -> None:
    base = _base(make_model(tmp_path / "resnet", "resnet"))
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    base.model.resnet.embedder.embedder.normalization = norm
    model = make_trainable(base, ModelSettings(), LORA)
    before = _statistics(norm)
    assert before
    _step(model, base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in _statistics(norm).items())


def test_trained_tensors_are_all_that_a_model_needs_to_become_the_trained_one(architecture: Path) -> None:
    for tuning in ("lora", "head", "full"):
        base = _base(architecture)
        trained = make_trainable(base, ModelSettings(tuning=tuning), LORA)
        _step(trained, base)
        perturb(trained)
        saved = {name: tensor.clone() for name, tensor in trained_tensors(trained)}
        other = make_trainable(_base(architecture), ModelSettings(tuning=tuning), LORA)
        assert not torch.equal(_loss(other.eval(), base), _loss(trained.eval(), base))
        load_trained(other, saved)
        assert torch.equal(_loss(other.eval(), base), _loss(trained.eval(), base))


def _is_of_first_layer(name: str) -> bool:
    return ".stages.1." not in name and any(part in name for part in (".layer.0.", ".layers.0.", ".stages.0."))


@pytest.mark.parametrize("name", ["vit", "deit", "beit", "swin", "swinv2", "dinov2", "convnext"])
@pytest.mark.parametrize("tuning", ["lora", "head"])
def test_a_layer_missing_from_the_checkpoint_trains_and_travels(name: str, tuning: Any, tmp_path: Path) -> None:
    """Left random and frozen it would only be noise; the adapter has to bring it along."""
    directory = make_model(tmp_path / name, name)

    def remove_first_layer(state: dict[str, Tensor]) -> None:
        for key in [key for key in state if _is_of_first_layer(key)]:
            del state[key]

    edit_tensors(directory / "model.safetensors", remove_first_layer)
    base = _base(directory)
    assert len(base.heads) > 1
    assert not any(a != b and a.startswith(f"{b}.") for a in base.heads for b in base.heads), "one head in another"
    model = make_trainable(base, ModelSettings(tuning=tuning), LORA)
    frozen = {
        key
        for key, parameter in model.named_parameters()
        if _is_of_first_layer(key) and not parameter.requires_grad and parameter_names.is_counted(key)
    }
    assert not frozen
    assert any(_is_of_first_layer(key) for key in _training(model))
    perturb(model)
    expected = model.eval()(pixel_values=_pixels(base)).logits
    adapters.save_adapter(model, tmp_path / "adapter")
    other = _base(directory, seed=1)
    assert other.fingerprint == base.fingerprint
    loaded = load_adapter(other.model, tmp_path / "adapter")
    torch.testing.assert_close(loaded(pixel_values=_pixels(base)).logits, expected)
    merged = adapters.merge(loaded).eval()
    torch.testing.assert_close(merged(pixel_values=_pixels(base)).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_whose_layers_have_other_weights_is_refused(tmp_path: Path) -> None:
    """Random weights would stand in their place, and train beside LoRA."""
    directory = make_model(tmp_path / "convnext", "convnext")

    def rename(state: dict[str, Tensor]) -> None:
        for key in [key for key in state if ".pwconv1." in key]:
            state[key.replace("pwconv1", "fc1")] = state.pop(key)

    edit_tensors(directory / "model.safetensors", rename)
    with pytest.raises(UserError, match=r"it lacks convnext\..*pwconv1\.bias and has convnext\..*fc1\.bias instead"):
        _base(directory)


@pytest.mark.parametrize(
    ("pattern", "renamed", "message"),
    [
        (r"^", "module.", r"names such as module\.\S+, which a wrapper gave them"),
        (r"^", "_orig_mod.", r"names such as _orig_mod\.\S+, which a wrapper gave them"),
        (r"layer\.1\.", "layer.1._orig_mod.", r"names such as vit\.\S+\._orig_mod\.\S+, which a wrapper gave them"),
        (r"^", "net.", r"names such as net\.\S+, and none such as \S+\. Rename its weights"),
    ],
)
def test_a_checkpoint_with_the_names_of_a_wrapper_is_refused(
    pattern: str, renamed: str, message: str, tmp_path: Path
) -> None:
    directory = make_model(tmp_path / "vit", num_labels=3)

    def rename(state: dict[str, Tensor]) -> None:
        for key in list(state):
            state[re.sub(pattern, renamed, key)] = state.pop(key)

    edit_tensors(directory / "model.safetensors", rename)
    with pytest.raises(UserError, match=message):
        _base(directory)


def test_a_timm_checkpoint_that_was_fused_for_inference_is_refused(tmp_path: Path) -> None:
    """Less than half of FastViT's weights are of layers that are fused, the others would load."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("fastvit_t8", layers=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_classes=2).eval()
    fused = timm.utils.model.reparameterize_model(model)
    arguments = {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)}
    timm.models.save_for_hf(fused, tmp_path, model_args=arguments, safe_serialization=True)
    with pytest.raises(UserError, match=r"does not fit fastvit_t8: it lacks .* If it was fused for inference"):
        _base(tmp_path)


def test_the_pooler_that_a_masked_image_model_lacks_trains(tmp_path: Path) -> None:
    config = BeitConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        vocab_size=16,
        use_mask_token=True,
        use_mean_pooling=True,
    )
    BeitForMaskedImageModeling(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    base = _base(tmp_path)
    assert base.heads == ["classifier", "beit.pooler.layernorm"]
    model = make_trainable(base, ModelSettings(), LORA)
    assert any("pooler.layernorm.modules_to_save" in name for name in _training(model))


def test_a_parameter_of_another_shape_in_the_backbone_trains(tmp_path: Path) -> None:
    """`transformers` makes it anew, as it does with a head for other classes, and says so in a warning only."""
    directory = make_model(tmp_path / "vit")

    def reshape(state: dict[str, Tensor]) -> None:
        name = next(name for name in state if name.endswith("layer.0.intermediate.dense.bias"))
        state[name] = state[name][:-1].clone()

    edit_tensors(directory / "model.safetensors", reshape)
    base = _base(directory)
    assert base.heads == ["classifier", "vit.layers.0.mlp.fc1"]


def test_the_fingerprint_is_of_the_backbone_alone(architecture: Path) -> None:
    base = _base(architecture)
    assert base.fingerprint == _base(architecture, ["a", "b", "c", "d", "e"], seed=7).fingerprint
    backbone = getattr(base.model, base.model.base_model_prefix)
    assert fingerprint(nn.ModuleDict({"renamed": backbone}), []) == base.fingerprint
    for _, tensor in backbone.named_parameters():
        with torch.no_grad():
            tensor.view(-1)[0] += 1e-3
            assert fingerprint(base.model, base.heads) != base.fingerprint
            tensor.view(-1)[0] -= 1e-3
        break


def test_the_fingerprint_sees_every_tensor_of_the_backbone(vit: Path) -> None:
    base = _base(vit)
    for name, tensor in base.model.vit.named_parameters():
        kept = tensor.detach().clone()
        tensor.data.view(-1)[-1] += 1e-3
        assert fingerprint(base.model, base.heads) != base.fingerprint, name
        tensor.data.copy_(kept)
    assert fingerprint(base.model, base.heads) == base.fingerprint


def test_the_fingerprint_tells_seeds_apart_and_survives_a_save_in_the_old_names(vit: Path, tmp_path: Path) -> None:
    base = _base(vit)
    other = make_model(tmp_path / "other", seed=1)
    assert _base(other).fingerprint != base.fingerprint
    base.model.save_pretrained(tmp_path / "saved")
    base.processor.save_pretrained(tmp_path / "saved")
    assert _base(tmp_path / "saved").fingerprint == base.fingerprint


def test_the_seed_decides_a_new_head(vit: Path) -> None:
    first, again, other = (_base(vit, seed=seed).model.classifier.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_weights_from_a_configuration(vit: Path) -> None:
    first, again, other = (_base(vit, init_from_config=True, seed=seed) for seed in (3, 3, 4))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert first.fingerprint != _base(vit).fingerprint


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_gradient_checkpointing_gives_the_same_gradients(architecture: Path, tuning: Any) -> None:
    base = _base(architecture)
    settings = ModelSettings(tuning=tuning, gradient_checkpointing=True)
    if architecture.name in WITHOUT_CHECKPOINTING:
        with pytest.raises(UserError, match="gradient_checkpointing"):
            make_trainable(base, settings, LORA)
        return
    model = make_trainable(base, settings, LORA)
    perturb(model, scale=0.05)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    plain_base = _base(architecture)
    plain = make_trainable(plain_base, ModelSettings(tuning=tuning), LORA)
    perturb(plain, scale=0.05)
    expected = _step(plain, plain_base)
    actual = _step(model, base)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_gradient_checkpointing_recomputes(vit: Path) -> None:
    base = _base(vit)
    model = make_trainable(base, ModelSettings(gradient_checkpointing=True), LORA)
    calls = []
    next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp.fc1")).register_forward_hook(
        lambda *_: calls.append(1)
    )
    _step(model, base)
    assert len(calls) == 2


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_trains_the_same_step(vit: Path) -> None:
    results = []
    for torch_compile in (False, True):
        base = _base(vit)
        model = make_trainable(base, ModelSettings(torch_compile=torch_compile), LORA)
        perturb(model)
        optimizer = torch.optim.SGD([tensor for tensor in model.parameters() if tensor.requires_grad], lr=0.1)
        set_training(model)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = _loss(model, base)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        results.append(losses)
        compiled = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
        blocks = {f"base_model.model.vit.layers.{number}" for number in range(2)}
        assert compiled >= blocks if torch_compile else not compiled
        assert "" not in compiled
        assert not any("_orig_mod" in name for name in _training(model))
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[0][0] != results[0][1]


@pytest.mark.parametrize("content", [None, "{}", '{"model_type": "bert"}', "{ no"])
def test_what_is_no_image_classifier_is_refused_by_name(content: str | None, vit: Path, tmp_path: Path) -> None:
    if content is not None:
        shutil.copy(vit / "preprocessor_config.json", tmp_path)
        (tmp_path / "config.json").write_text(content)
    name = tmp_path if content is not None else tmp_path / "nowhere"
    with pytest.raises(UserError, match=f"cannot load the base model '{name}'"):
        _base(name)


@pytest.mark.parametrize("tuning", ["lora", "head"])
def test_a_module_that_peft_takes_for_its_own_is_refused(tuning: Any, vit: Path) -> None:
    """timm's DLA has a module of this name, and PEFT would fail when the adapter is merged."""
    base = _base(vit)
    base.model.vit.base_layer = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"takes the module vit.base_layer .* train with --tuning full"):
        make_trainable(base, ModelSettings(tuning=tuning), LoraSettings())


def test_a_damaged_configuration_is_refused_in_a_sentence(vit: Path, tmp_path: Path) -> None:
    shutil.copytree(vit, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "config.json", hidden_size="many")
    reason = "config.json is damaged: .*hidden_size"
    with pytest.raises(UserError, match=f"cannot load the base model '{tmp_path}'.*{reason}") as caught:
        _base(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_directory_of_a_run_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match=rf"It is the output directory of a run; pass its result, {tmp_path}/adapter, as --adapter_n"
    ):
        _base(tmp_path)


@pytest.mark.parametrize(("model", "package"), [("timm_wrapper", "timm"), ("dinat", "natten")])
def test_a_missing_package_is_named_with_the_command(model: str, package: str, vit: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    shutil.copy(vit / "preprocessor_config.json", tmp_path)
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model}", "architecture": "vit_tiny_patch16_224"}}')
    with pytest.raises(UserError, match=rf"^the model '{tmp_path}' needs a package .*: pip install {package}$"):
        _base(tmp_path, init_from_config=True)


def test_damaged_weights_are_refused_by_name(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "vit")
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"cannot load the base model '{directory}'"):
        _base(directory)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", POINTER, r"model\.safetensors is a pointer of Git LFS.*: run `git lfs pull`"),
        ("pytorch_model.bin", POINTER, r"pytorch_model\.bin is a pointer of Git LFS.*: run `git lfs pull`"),
        ("pytorch_model.bin", pickle.dumps(Path), r"pytorch_model\.bin is damaged, or holds more than tensors"),
    ],
)
def test_files_without_weights_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "vit")
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        _base(directory)


def test_weights_without_values_and_without_a_place_are_named(
    vit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint that lacks a layer, or has one more than its configuration, is probably not the one that was
    meant."""
    directory = shutil.copytree(vit, tmp_path / "vit")
    settings = Settings(model=ModelSettings(model_name_or_path=str(directory)))
    with caplog.at_level(logging.INFO):
        load_warm_start(settings, LABELS)
        assert "lacks" not in caplog.text, "a new head is no surprise"
        edit_tensors(directory / "model.safetensors", lambda state: state.pop("vit.embeddings.position_embeddings"))
        edit_tensors(directory / "model.safetensors", lambda state: state.update(other=torch.zeros(2)))
        load_warm_start(settings, LABELS)
        named = "lacks vit.embeddings.position_embeddings, or has them in another shape: these weights are random"
        assert [record.levelname for record in caplog.records if named in record.message] == ["WARNING"]
        assert f"does not use all weights of {directory}: other" in caplog.text
        caplog.clear()
        unrelated = {
            "vit.embeddings.position_embeddings": torch.zeros(1, 2, 2),
            "vit.embeddings.mask_token": torch.zeros(2),
        }
        edit_tensors(directory / "model.safetensors", lambda state: state.update(unrelated))
        load_warm_start(settings, LABELS)
        assert named in caplog.text, "a mask token does not stand in the place of a table of another size"


def test_quantized_weights_are_refused(vit: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(vit, tmp_path / "vit")
    edit_json(directory / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="its weights are quantized; take the checkpoint from before the quantization"):
        _base(directory)


def test_an_adapter_in_place_of_a_base_is_named(vit: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "adapter", vit, LABELS)
    for is_of_peft in (False, True):
        if is_of_peft:
            (tmp_path / "adapter" / "config.json").unlink()
        with pytest.raises(UserError, match=r"is an adapter, not a base model: .* --adapter_name_or_path"):
            _base(tmp_path / "adapter")


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_base_with_an_adapter_beside_it_is_to_be_merged_first(vit: Path, tmp_path: Path, tuning: Any) -> None:
    directory = shutil.copytree(vit, tmp_path / "vit")
    labels = ["LABEL_0", "LABEL_1"]
    write_bundle(tmp_path / "adapter", vit, labels, lora_target_modules=["q_proj"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, directory)
    edit_json(directory / "adapter_config.json", base_model_name_or_path=str(directory))
    with pytest.raises(UserError, match=r"with an adapter beside it .* --merge_to DIRECTORY, and train from there"):
        make_trainable(_base(directory, labels), ModelSettings(tuning=tuning), LORA)
