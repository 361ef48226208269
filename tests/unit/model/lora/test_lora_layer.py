"""The one-function linear layer of LoRA against PEFT's own, and where it steps aside."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners import lora
from torch import Tensor, nn

from lora_dist.model.lora import lora_layer

ROWS, WIDTH, OUT, RANK = 12, 24, 20, 4


def layer_of(bias: bool = True, dropout: float = 0.0, **config: object) -> lora.Linear:
    """PEFT's layer on a frozen linear one, with all weights random."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, OUT, bias=bias))
    settings = LoraConfig(r=RANK, lora_alpha=6, lora_dropout=dropout, target_modules=["0"], **config)  # type: ignore[arg-type]
    layer = inject_adapter_in_model(settings, model)[0]
    assert isinstance(layer, lora.Linear)
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def pair(**config: object) -> tuple[lora.Linear, lora.Linear]:
    """PEFT's layer, and a copy that runs as one function where it may."""
    layer = layer_of(**config)  # type: ignore[arg-type]
    fast = copy.deepcopy(layer)
    lora_layer.speed_up(fast)
    return layer, fast


def run(layer: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """The output, and the gradients of a loss that is not linear in it."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = layer(x)
    output.float().pow(2).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": output.detach(), "x": x.grad, **gradients}


def require_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        largest = max(tensor.abs().flatten().tolist(), default=0.0)
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=tolerance, atol=tolerance * largest)


def mask_of(rows: Tensor, rate: float) -> tuple[Tensor, float]:
    """What dropout keeps of `rows`, and the share that it says it keeps."""
    drawn, keep = lora_layer.draw_mask(rows, rate)
    mask = lora_layer._as_factor(drawn, rows.dtype)
    assert mask is not None
    return mask, keep


def is_one_function(layer: nn.Module, x: Tensor) -> bool:
    output = layer(x.requires_grad_())  # which keeps its graph
    return "LoraLinear" in {type(node).__name__.removesuffix("Backward") for node in _nodes(output.grad_fn)}


def _nodes(function: object) -> list[object]:
    return [] if function is None else [function, *(n for f, _ in function.next_functions for n in _nodes(f))]  # type: ignore[attr-defined]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (3, 4, WIDTH), (2, 3, 2, WIDTH), (3, WIDTH, WIDTH), (0, 4, WIDTH)])
def test_same_numbers_in_fp32(bias: bool, shape: tuple[int, ...]) -> None:
    peft, fast = pair(bias=bias)
    x = torch.randn(shape)
    assert is_one_function(fast, x.clone())
    require_close(run(fast, x), run(peft, x), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_numbers_under_autocast(dtype: torch.dtype) -> None:
    (peft, fast), exactly = pair(), layer_of()
    x = torch.randn(3, 4, WIDTH)
    exact, expected, found = run(exactly, x), run(peft, x, dtype), run(fast, x, dtype)
    eps = torch.finfo(dtype).eps
    require_close(found, expected, 8 * eps)
    for name, tensor in exact.items():
        off = (found[name].float() - tensor).abs().max()
        assert off <= 1.5 * (expected[name].float() - tensor).abs().max() + eps * tensor.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_numbers_in_half_precision(dtype: torch.dtype) -> None:
    peft, fast = (layer.to(dtype) for layer in pair())
    x = torch.randn(3, 4, WIDTH, dtype=dtype)
    assert is_one_function(fast, x.clone())
    require_close(run(fast, x), run(peft, x), 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_lora_adds_is_not_lost_in_half_precision(dtype: torch.dtype) -> None:
    """It is less than a rounding error of the weights; and the weights alone give 0 here."""
    peft, fast = pair(bias=False)
    x = torch.randn(2 * WIDTH, WIDTH // 2).repeat_interleave(2, 1)
    x[:, 1::2] *= -1
    for layer in (peft, fast):
        nn.init.ones_(layer.base_layer.weight)
        layer.lora_B["default"].weight.data *= 1e-4
        layer.to(dtype)
    found, expected = (run(layer, x.to(dtype)) for layer in (fast, peft))
    assert expected["output"].abs().min() > 0
    require_close({"output": found["output"]}, {"output": expected["output"]}, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(rate: float) -> None:
    peft, fast = pair(dropout=rate)
    x = torch.randn(ROWS, WIDTH)
    require_close(run(fast, x), run(peft, x), 1e-6)


def test_keeps_no_copy_of_the_weights_for_the_backward_pass() -> None:
    """FSDP releases the weights after the forward pass; a copy would stay."""
    _, fast = pair()
    kept: list[Tensor] = []
    x = torch.randn(3, WIDTH, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        fast(x)
    weight = fast.base_layer.weight
    of_its_size = [tensor for tensor in kept if tensor.shape == weight.shape]
    assert {tensor.data_ptr() for tensor in of_its_size} == {weight.data_ptr()}


def test_input_that_needs_no_gradient() -> None:
    _, fast = pair()
    fast(torch.randn(ROWS, WIDTH)).sum().backward()
    assert fast.lora_A["default"].weight.grad is not None


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_is_that_of_the_formula(rate: float) -> None:
    _, fast = pair(dropout=rate)
    x = torch.randn(ROWS, WIDTH)
    torch.manual_seed(5)
    found = run(fast, x)
    torch.manual_seed(5)
    mask, keep = mask_of(x, rate)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            plain = layer_of()
            self.base_layer, self.lora_A, self.lora_B = plain.base_layer, plain.lora_A, plain.lora_B
            self.scaling = plain.scaling["default"]

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x * mask / keep)) * self.scaling

    require_close(found, run(Plain(), x), 1e-6)


@pytest.mark.parametrize("width", [1000, 999])  # a multiple of eight, or none
@pytest.mark.parametrize("rate", [1e-6, 0.005, 0.1, 0.3, 0.995, 0.999999])
def test_dropout_keeps_its_share_independently(rate: float, width: int) -> None:
    torch.manual_seed(0)
    rows = torch.empty(1001, width)
    mask, keep = mask_of(rows, rate)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert keep == 1 - rate
    count = mask.numel()
    assert mask.sum().item() == pytest.approx(keep * count, abs=5 * (keep * (1 - keep) * count) ** 0.5)
    if rate < 0.5:
        flat = mask.flatten() - keep
        for lag in (1, 2, 3, 4, 8, width):
            correlation = (flat[lag:] * flat[:-lag]).mean().item() / (keep * (1 - keep))
            assert abs(correlation) < 5 / count**0.5


def test_dropout_only_when_training_and_new_each_time() -> None:
    _, fast = pair(dropout=0.5)
    x = torch.randn(ROWS, WIDTH)
    assert not torch.equal(fast(x), fast(x))
    fast.eval()
    assert torch.equal(fast(x), fast(x))


def test_recomputed_activations_have_the_same_mask() -> None:
    from torch.utils.checkpoint import checkpoint

    _, fast = pair(dropout=0.5)
    x = torch.randn(ROWS, WIDTH)
    torch.manual_seed(3)
    plain = run(fast, x)
    fast.zero_grad()

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fast

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, x, use_reentrant=False)

    torch.manual_seed(3)
    found = {name.removeprefix("layer."): tensor for name, tensor in run(Recomputed(), x).items()}
    require_close(found, plain, 0)


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}], ids=["dora", "lora_bias", "bias"]
)
def test_steps_aside_for_what_it_does_not_cover(config: dict[str, object]) -> None:
    torch.manual_seed(0)
    settings = LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False, **config)  # type: ignore[arg-type]
    model = get_peft_model(nn.Sequential(nn.Linear(WIDTH, OUT)), settings)
    fast = copy.deepcopy(model)
    lora_layer.speed_up(fast)
    x = torch.randn(ROWS, WIDTH)
    assert not is_one_function(fast, x.clone())
    require_close(run(fast, x), run(model, x), 0)


@pytest.mark.parametrize("shape", [(WIDTH,), (ROWS, WIDTH), (3, 4, WIDTH), (2, 3, 2, WIDTH)])
def test_output_can_be_modified_in_place(shape: tuple[int, ...]) -> None:
    """Swin Transformer V2 clamps, and many networks activate, in place."""
    peft, fast = (nn.Sequential(layer, nn.ReLU(inplace=True)) for layer in pair())
    x = torch.randn(shape)
    require_close(run(fast, x), run(peft, x), 1e-6)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_inputs_that_are_views_or_not_contiguous(dropout: float) -> None:
    peft, fast = pair(dropout=dropout)
    images = torch.randn(2, WIDTH, 3, 4)
    for x in (images.permute(0, 2, 3, 1), images.flatten(2).transpose(1, 2), torch.randn(2 * ROWS, WIDTH)[::2]):
        assert is_one_function(fast, x.detach())
        require_close(run(fast, x), run(peft, x), 1e-6)
    wide = torch.randn(ROWS, 1).expand(ROWS, WIDTH)
    require_close(run(fast, wide), run(peft, wide), 1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("rows", [ROWS, 3 * WIDTH])
def test_second_derivatives(rows: int, rate: float) -> None:
    def gradients(layer: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        x = torch.randn(rows, WIDTH, requires_grad=True)
        inputs = [x, *(value for value in layer.parameters() if value.requires_grad)]
        torch.manual_seed(2)
        first = torch.autograd.grad(layer(x).pow(3).sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(one.pow(2).sum() for one in first), inputs))

    class Plain(nn.Module):
        def __init__(self, fast: lora.Linear) -> None:
            super().__init__()
            self.fast = fast

        def forward(self, x: Tensor) -> Tensor:
            drawn, keep = lora_layer.draw_mask(x, rate)
            kept = x if drawn is None else x * drawn / keep
            down, up = self.fast.lora_A["default"], self.fast.lora_B["default"]
            return self.fast.base_layer(x) + up(down(kept)) * self.fast.scaling["default"]

    _, fast = pair(dropout=rate)
    for found, expected in zip(gradients(fast), gradients(Plain(fast)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_transforms_of_torch_func() -> None:
    peft, fast = pair()
    x = torch.randn(ROWS, WIDTH)

    def losses(layer: nn.Module) -> list[Tensor]:
        values = {name: value.detach() for name, value in layer.named_parameters()}

        def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
            return torch.func.functional_call(layer, values, (row,)).pow(2).sum()

        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
        _, tangent = torch.func.jvp(lambda one: layer(one), (x,), (torch.ones_like(x),))
        hessian = torch.func.hessian(lambda row: loss(values, row))(x[0])
        return [*per_sample.values(), tangent, hessian]

    for found, expected in zip(losses(fast), losses(peft), strict=True):
        torch.testing.assert_close(found, expected)


def test_hooks_on_the_layers_inside_are_called() -> None:
    _, fast = pair()
    x = torch.randn(ROWS, WIDTH)
    for inside in (fast.base_layer, fast.lora_A["default"], fast.lora_B["default"], fast.lora_dropout["default"]):
        called: list[nn.Module] = []
        for register in (inside.register_forward_hook, inside.register_forward_pre_hook):
            hook = register(lambda module, *_, called=called: called.append(module))
            fast(x)
            hook.remove()
        assert called == [inside, inside]
    hook = fast.base_layer.register_full_backward_hook(lambda module, *_: called.append(module))
    fast(x.clone().requires_grad_()).sum().backward()
    hook.remove()
    assert called[2:] == [fast.base_layer]
    assert is_one_function(fast, x.clone())
    fast.base_layer.forward = lambda inputs: torch.zeros(ROWS, OUT)  # type: ignore[method-assign]  # as accelerate does
    assert not is_one_function(fast, x.clone())


def test_steps_aside_when_disabled_merged_or_several() -> None:
    peft, fast = pair()
    x = torch.randn(ROWS, WIDTH)
    for change in (lambda layer: layer.enable_adapters(False), lambda layer: layer.merge()):
        changed, plain = copy.deepcopy(fast).eval(), copy.deepcopy(peft).eval()
        change(changed)
        change(plain)
        assert not is_one_function(changed, x.clone())
        assert torch.equal(changed(x), plain(x))
    for layer in (peft, fast):
        layer.update_layer("other", r=2, lora_alpha=2, config=LoraConfig(r=2, init_lora_weights=False))
        layer.set_adapter(["default", "other"])
    fast.load_state_dict(peft.state_dict())
    assert not is_one_function(fast, x.clone())
    assert torch.equal(fast(x), peft(x))


def test_matrices_in_fp32_on_a_base_in_bf16() -> None:
    """PEFT computes their product in fp32."""
    peft, fast = pair()
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16)
    for layer in (peft, fast):
        layer.base_layer.to(torch.bfloat16)
    assert is_one_function(fast, x.clone())
    require_close(run(fast, x), run(peft, x), 0.02)


def test_steps_aside_for_matrices_in_half_precision_on_a_base_in_fp32() -> None:
    _, fast = pair()
    fast.lora_A.to(torch.bfloat16)
    fast.lora_B.to(torch.bfloat16)
    assert not is_one_function(fast, torch.randn(ROWS, WIDTH))


def test_saves_and_merges_as_peft_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(WIDTH, OUT)), config)
    fast = copy.deepcopy(model)
    lora_layer.speed_up(fast)
    assert fast.state_dict().keys() == model.state_dict().keys()
    for name, saved in (("peft", model), ("fast", fast)):
        saved.save_pretrained(str(tmp_path / name))
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("peft", "fast"))
    assert first == second
    x = torch.randn(ROWS, WIDTH)
    torch.testing.assert_close(fast.merge_and_unload()(x), model(x))


def test_compiled_model_has_the_same_numbers() -> None:
    peft, fast = pair()
    x = torch.randn(ROWS, WIDTH)
    require_close(
        run(torch.compile(fast, backend="aot_eager"), x),
        {  # names of a compiled module have a prefix
            (f"_orig_mod.{n}" if "." in n else n): t for n, t in run(peft, x).items()
        },
        1e-6,
    )
