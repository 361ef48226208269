"""A base in bf16 under LoRA and a head in fp32: the same gradients up to bf16, and a result for the base in fp32."""

from pathlib import Path

import pytest
import torch
from lora_dist_testing.architectures import make_checkpoint
from lora_dist_testing.tiny import make_model, perturb
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lora_dist
from lora_dist.engines.bf16_base import cast_base, require_bf16_forward
from lora_dist.engines.engine import make_engine
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import load_base
from lora_dist.model.base.head import fingerprint
from lora_dist.model.lora import adapters, lora_layer
from lora_dist.model.lora.trainable import blank_image, load_trained, make_trainable, set_training
from lora_dist.processes.runtime import launch, require_bf16
from lora_dist.settings.train import LoraSettings, ModelSettings, OptimizationSettings
from lora_dist.training.optimizer import make_optimizer

LABELS = ["x", "y", "z"]


def _model(directory: Path, in_bf16: bool, **lora: object) -> tuple[nn.Module, list[str], str]:
    base = load_base(str(directory), LABELS)
    settings = LoraSettings(**{"lora_r": 4, "lora_dropout": 0.0} | lora)  # type: ignore[arg-type]
    model = make_trainable(base, ModelSettings(), settings)
    perturb(model, 0, scale=0.1)
    if in_bf16:
        cast_base(model, base.heads)
    set_training(model)
    return model, base.heads, base.fingerprint


def _pixels(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    labels = torch.tensor([0, 1, 2, 1])
    cross_entropy(model(pixel_values=_pixels()).logits.float(), labels).backward()
    return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.mark.parametrize("architecture", ["vit", "convnext", "resnet"])
def test_what_trains_is_in_fp32_and_has_the_gradients_of_fp32(architecture: str, tmp_path: Path) -> None:
    directory = make_model(tmp_path / architecture, architecture)
    (expected_model, _, _), (model, heads, recorded) = (_model(directory, in_bf16) for in_bf16 in (False, True))
    expected, found = _gradients(expected_model), _gradients(model)
    assert found.keys() == expected.keys() != set()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32, name
        cosine = nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.98, name
        assert float(gradient.norm()) == pytest.approx(float(expected[name].norm()), rel=0.1), name
    dtypes = {
        (tensor.requires_grad, tensor.dtype) for name, tensor in model.named_parameters() if "original" not in name
    }
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert model(pixel_values=_pixels()).logits.dtype == torch.float32
    assert recorded == fingerprint(load_base(str(directory), LABELS).model, heads)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_fast_layer_stays_in_use(dropout: float, vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    apply = lora_layer.LoraLinear.apply
    monkeypatch.setattr(lora_layer.LoraLinear, "apply", lambda *given: calls.append(given[0].dtype) or apply(*given))
    model, _, _ = _model(vit, in_bf16=True, lora_dropout=dropout)
    calls.clear()
    _gradients(model)
    assert calls == [torch.bfloat16] * 4


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"use_rslora": True}], ids=str)
def test_other_kinds_of_lora_have_the_gradients_of_fp32(lora: dict[str, object], vit: Path) -> None:
    expected, found = (_gradients(_model(vit, in_bf16, **lora)[0]) for in_bf16 in (False, True))
    for name, gradient in found.items():
        cosine = nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.98, name


def test_an_update_changes_only_what_trains_and_the_result_is_merged_in_fp32(vit: Path) -> None:
    model, heads, _ = _model(vit, in_bf16=True)
    settings = OptimizationSettings(mixed_precision="no")
    engine = make_engine(launch("no", bf16_base=True), model, make_optimizer(model, settings, 1.0, heads), settings)
    frozen = {name: tensor.clone() for name, tensor in model.named_parameters() if not tensor.requires_grad}
    engine.begin_update(1e-3)
    _gradients(engine.model)
    engine.step(engine.clip_gradient(1.0).tolist())
    assert all(torch.equal(tensor, dict(model.named_parameters())[name]) for name, tensor in frozen.items())
    trained = engine.trainable_state()
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}

    written, _, _ = _model(vit, in_bf16=False)
    load_trained(written, trained)
    with torch.no_grad():
        expected = written.eval()(pixel_values=_pixels()).logits
        merged = adapters.merge(written)(pixel_values=_pixels()).logits
        in_bf16 = engine.model.eval()(pixel_values=_pixels()).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(in_bf16, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert not torch.equal(in_bf16, expected)


def test_a_base_that_goes_on_after_a_head_is_refused(vit: Path) -> None:
    model = make_trainable(load_base(str(vit), LABELS), ModelSettings(), LoraSettings(lora_r=2))
    cast_base(model, ["vit.embeddings", "classifier"])
    with pytest.raises(UserError, match=r"does not run with its base in bf16 and what trains in fp32 \("):
        require_bf16_forward(model, _pixels())


def test_two_heads_side_by_side_run_on_a_base_in_bf16(tmp_path: Path) -> None:
    """LeViT's two heads each have a norm, and its attention keeps a table of the weights before the cast."""
    base = load_base(str(make_checkpoint(tmp_path / "levit", "levit")), LABELS)
    model = make_trainable(base, ModelSettings(), LoraSettings(lora_r=2))
    pixels = blank_image(base.processor)
    expected = model(pixel_values=pixels).logits
    cast_base(model, base.heads)
    require_bf16_forward(model, pixels)
    torch.testing.assert_close(model(pixel_values=pixels).logits, expected, rtol=0, atol=0.05)


def test_two_heads_with_a_norm_of_the_base_between_them_run_on_a_base_in_bf16(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    arguments = {"embed_dim": (16, 16), "depth": (1, 1)}
    made = timm.create_model("repvit_m0_9", num_classes=3, **arguments)
    timm.models.save_for_hf(made, tmp_path, model_args=arguments, safe_serialization=True)
    base = load_base(str(tmp_path), LABELS)
    assert len(base.heads) == 2
    model = make_trainable(base, ModelSettings(), LoraSettings(lora_r=2))
    cast_base(model, base.heads)
    require_bf16_forward(model, blank_image(base.processor))


@pytest.mark.parametrize(("precision", "engine"), [("no", "DEEPSPEED"), ("fp16", "NO")])
def test_launches_without_such_a_base_are_refused(precision: str, engine: str) -> None:
    with pytest.raises(UserError, match=r"--base_dtype bfloat16: .*(DeepSpeed|fp16)"):
        require_bf16(precision, on_cpu=False, engine=engine)
    require_bf16("bf16", on_cpu=False, engine="FSDP")


class _Constants(nn.Module):
    """A layer of saved constants, as the cosine transform of CSATv2."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cosines", torch.eye(32))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.cosines)


def test_a_base_that_does_not_run_in_bf16_is_refused(vit: Path) -> None:
    model, _, _ = _model(vit, in_bf16=True)
    require_bf16_forward(model, _pixels())
    base = load_base(str(vit), LABELS)
    base.model.vit.layernorm = nn.Sequential(_Constants(), base.model.vit.layernorm)
    refused = make_trainable(base, ModelSettings(), LoraSettings(lora_r=2))
    cast_base(refused, base.heads)
    with pytest.raises(UserError, match=r"--base_dtype bfloat16: the model does not run .*\. Use --mixed"):
        require_bf16_forward(refused, _pixels())


def test_a_result_with_norms_that_are_called_as_a_head_is_written(photos: Path, tmp_path: Path) -> None:
    """PEFT wraps all norms of PoolFormer, because its head has one; the check of the result refused them."""
    result = lora_dist.fit(
        model_name_or_path=make_checkpoint(tmp_path / "poolformer", "poolformer"),
        train_dir=photos / "train",
        validation_dir=photos / "validation",
        output_dir=tmp_path / "run",
        max_train_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        base_dtype="bfloat16",
    )
    assert result.path.is_dir()
