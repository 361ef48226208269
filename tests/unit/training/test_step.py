"""One update is exact however it is split, and a run of them is that of the Trainer of transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_dist_testing.tiny import perturb
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from lora_dist.data.batch import Batch, TrainImages
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sampling.order import BatchPlan, ShuffledOrder
from lora_dist.data.sources.load import load_data
from lora_dist.engines.engine import Engine, make_engine
from lora_dist.model.base.backbone import Base, load_base
from lora_dist.model.lora.trainable import make_trainable, set_training
from lora_dist.processes.runtime import launch
from lora_dist.settings.train import (
    AugmentationSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    OptimizationSettings,
)
from lora_dist.training.optimizer import make_optimizer
from lora_dist.training.problems.loss import Loss
from lora_dist.training.schedule import Schedule
from lora_dist.training.step import GradientAccumulator, Update, make_update

LABELS = ["a", "b", "c"]


class Trained:
    """A tiny model with an adapter that is no no-op any more, ready for updates on this process."""

    def __init__(self, vit: Path, dropout: float = 0.0, ratio: float = 1.0, seed: int = 0, **optimizer: Any) -> None:
        self.base: Base = load_base(str(vit), LABELS)
        model = make_trainable(self.base, ModelSettings(), LoraSettings(lora_r=4, lora_dropout=dropout))
        perturb(model, seed, scale=0.1)
        settings = OptimizationSettings(mixed_precision="no", **optimizer)
        self.optimizer = make_optimizer(model, settings, ratio, [])
        self.engine: Engine = make_engine(launch("no"), model, self.optimizer, settings)
        set_training(self.engine.model)

    def update(self, batches: list[Batch] | Iterator[Batch], count: int, samples: float, **more: Any) -> Update:
        """One update over micro-batches."""
        settings: dict[str, Any] = {"learning_rate": 1e-3, "loss": Loss(), "dropout_seed": (0, 0)}
        max_grad_norm = more.pop("max_grad_norm", 1.0)
        gradient = GradientAccumulator(self.engine, micro_batch_count=count, total_weight=samples, **(settings | more))
        return make_update(gradient, iter(batches), max_grad_norm)

    def gradients(self) -> dict[str, Tensor]:
        """Of what trains, as they stand."""
        return {
            name: parameter.grad.clone()
            for name, parameter in self.engine.unwrapped.named_parameters()
            if parameter.grad is not None
        }


def _batch(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        pixel_values=torch.randn(count, 3, 32, 32, generator=generator),
        labels=torch.randint(3, (count,), generator=generator),
        weights=torch.ones(count),
        indices=torch.arange(count) + 100,
    )


def _split(batch: Batch, *sizes: int) -> list[Batch]:
    parts = [[None] * len(sizes) if tensor is None else tensor.split(sizes) for tensor in batch]
    return [Batch(*part) for part in zip(*parts, strict=True)]


def _assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert actual
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "sizes",
    [(3, 3, 3, 3), (4, 4, 4), (1,) * 12, (5, 5, 2), (3, 3, 3, 2, 1), (11, 1)],
    ids=str,
)
def test_an_update_does_not_depend_on_how_its_batch_is_split(sizes: tuple[int, ...], vit: Path) -> None:
    """The last micro-batches may be smaller: each sample counts the same."""
    whole, split = Trained(vit), Trained(vit)
    for step in range(3):
        batch = _batch(12, seed=step)
        expected = whole.update([batch], 1, 12)
        actual = split.update(_split(batch, *sizes), len(sizes), 12)
        assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
        assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        _assert_equal(split.gradients(), whole.gradients())
    before = Trained(vit).engine.trainable_state()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in whole.engine.trainable_state().items())
    for name, tensor in split.engine.trainable_state().items():
        # AdamW divides by the root of the squared gradient, so that entries near zero amplify float error.
        torch.testing.assert_close(tensor, whole.engine.trainable_state()[name], rtol=0, atol=2e-5, msg=name)


def test_gradients_differ_inside_a_window_and_agree_at_its_end(vit: Path) -> None:
    whole, split = Trained(vit), Trained(vit)
    batch = _batch(13)
    whole.update([batch], 1, 13, max_grad_norm=0.0)
    expected = whole.gradients()
    inside: list[dict[str, Tensor]] = []

    def watched() -> Iterator[Batch]:
        for part in _split(batch, 3, 3, 3, 3, 1):
            inside.append(split.gradients())
            yield part

    split.update(watched(), 5, 13, max_grad_norm=0.0)
    assert inside[0] == {}
    for gradients in inside[1:]:
        assert all(not torch.allclose(gradient, expected[name], rtol=1e-3) for name, gradient in gradients.items())
    _assert_equal(split.gradients(), expected)


def test_the_gradient_of_one_update_does_not_leak_into_the_next(vit: Path) -> None:
    once, twice = Trained(vit), Trained(vit)
    twice.update([_batch(4, seed=1)], 1, 4, learning_rate=0.0)
    for trained in (once, twice):
        trained.update([_batch(4)], 1, 4)
    _assert_equal(twice.gradients(), once.gradients())


def test_samples_of_weight_zero_count_for_nothing(vit: Path) -> None:
    plain, filled = Trained(vit), Trained(vit)
    batch = _batch(6)
    expected = plain.update(_split(batch, 4, 2)[:1], 1, 4)
    weights = torch.tensor([1.0, 1, 1, 1, 0, 0])
    actual = filled.update(_split(batch._replace(weights=weights), 4, 2), 2, 4)
    assert actual.loss == pytest.approx(expected.loss)
    _assert_equal(filled.gradients(), plain.gradients())


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6])
def test_the_gradient_is_clipped_to_its_limit_and_its_norm_is_that_before(limit: float, vit: Path) -> None:
    trained = Trained(vit)
    update = trained.update([_batch(4)], 1, 4, max_grad_norm=limit)
    after = float(torch.stack([gradient.norm() for gradient in trained.gradients().values()]).norm())
    assert update.grad_norm > 0.01
    assert after == pytest.approx(limit if limit == 0.01 else update.grad_norm, rel=1e-3)


def test_the_loss_is_that_before_the_update_over_all_samples(vit: Path) -> None:
    trained, batch = Trained(vit), _batch(5)
    with torch.no_grad():
        logits = trained.engine.model(pixel_values=batch.pixel_values).logits
    expected = float(nn.functional.cross_entropy(logits, batch.labels))
    assert trained.update(_split(batch, 3, 2), 2, 5).loss == pytest.approx(expected, rel=1e-5)


def test_dropout_is_a_function_of_its_seed(vit: Path) -> None:
    losses = {}
    for name, seed in (("first", (1, 2)), ("again", (1, 2)), ("other", (1, 3))):
        torch.manual_seed(len(name))
        trained = Trained(vit, dropout=0.5)
        losses[name] = trained.update(_split(_batch(6), 3, 3), 2, 6, dropout_seed=seed).loss
    assert losses["first"] == losses["again"]
    assert losses["first"] != losses["other"]


def test_a_nan_image_is_named_and_nothing_is_changed(vit: Path) -> None:
    trained, undisturbed = Trained(vit), Trained(vit)
    for one in (trained, undisturbed):
        one.update([_batch(6)], 1, 6)
    weights, moments = trained.engine.trainable_state(), trained.engine.optimizer_state()
    pixels = _batch(6).pixel_values.clone()
    pixels[4, 0, 0, 0] = float("nan")
    update = trained.update(_split(_batch(6)._replace(pixel_values=pixels), 3, 3), 2, 6)
    assert (update.nonfinite, update.suspects) == ("loss", [104])
    for actual, expected in ((trained.engine.trainable_state(), weights), (trained.engine.optimizer_state(), moments)):
        assert actual.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())
    for one in (trained, undisturbed):
        one.update([_batch(6, seed=1)], 1, 6)
    expected = undisturbed.engine.trainable_state()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained.engine.trainable_state().items())


def test_a_gradient_that_is_not_finite_is_noticed_before_the_update(vit: Path) -> None:
    """With a finite loss: here one whose slope at the present weights is infinite."""
    trained = Trained(vit)
    weights = trained.engine.trainable_state()

    def cusp(_: nn.Module, __: Any, output: Any) -> Any:
        weight = trained.engine.unwrapped.base_model.model.classifier.modules_to_save["default"].weight
        output.logits = output.logits + (weight - weight.detach()).sum().abs().sqrt()
        return output

    handle = trained.engine.unwrapped.register_forward_hook(cusp)
    update = trained.update([_batch(2)._replace(indices=torch.tensor([5, 9]))], 1, 2)
    handle.remove()
    assert (update.nonfinite, update.suspects) == ("gradient", [5, 9])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trained.engine.trainable_state().items())


def test_the_ratio_of_lora_plus_reaches_the_update(vit: Path) -> None:
    """The first update of AdamW moves every entry by its learning rate."""
    trained = Trained(vit, ratio=16.0)
    before = trained.engine.trainable_state()
    trained.update([_batch(8)], 1, 8, learning_rate=1e-4)
    assert {group["lr_ratio"]: group["lr"] for group in trained.optimizer.param_groups} == {
        1.0: 1e-4,
        16.0: pytest.approx(16e-4),
    }
    for name, tensor in trained.engine.trainable_state().items():
        moved = float((tensor - before[name]).abs().median())
        assert moved == pytest.approx(16e-4 if ".lora_B." in name else 1e-4, rel=0.05), name


def test_sgd_moves_by_its_momentum_however_the_batch_is_split(vit: Path) -> None:
    """v = 0.9 v + g, w = w - rate v; the weight decay of matrices is part of g."""
    sgd: dict[str, Any] = {"optim": "sgd", "weight_decay": 0.1}
    whole, split = Trained(vit, **sgd), Trained(vit, **sgd)
    velocity: dict[str, Tensor] = {}
    for step in range(3):
        before, batch = whole.engine.trainable_state(), _batch(12, seed=step)
        whole.update([batch], 1, 12, learning_rate=0.1)
        split.update(_split(batch, 5, 5, 2), 3, 12, learning_rate=0.1)
        after, gradients = whole.engine.trainable_state(), whole.gradients()
        for name, weight in before.items():
            gradient = gradients[name] + (0.1 * weight if weight.ndim > 1 else 0)
            velocity[name] = 0.9 * velocity[name] + gradient if name in velocity else gradient
            torch.testing.assert_close(after[name], weight - 0.1 * velocity[name], msg=name)
        _assert_equal(split.engine.trainable_state(), after)
    moments = whole.engine.optimizer_state()
    assert moments.keys() == {f"momentum_buffer/{name}" for name in velocity}
    other = Trained(vit, **sgd)
    other.engine.load_trainable_state(whole.engine.trainable_state())
    other.engine.load_optimizer_state(moments)
    for one in (whole, other):
        one.update([_batch(12, seed=9)], 1, 12, learning_rate=0.1)
    expected = whole.engine.trainable_state()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.engine.trainable_state().items())


def test_sgd_without_momentum_keeps_nothing(vit: Path) -> None:
    trained = Trained(vit, optim="sgd", momentum=0.0)
    trained.update([_batch(4)], 1, 4)
    assert trained.engine.optimizer_state() == {}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_mixed_images_is_mixed_by_their_shares(smoothing: float) -> None:
    logits = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0], [0.2, 0.2, 0.2], [5.0, 0.0, 0.0]])
    labels, partners = [0, 1, 2, 1], [2, 1, 0, 0]
    shares, weights = [0.75, 0.3, 1.0, 0.5], [1.0, 1.0, 1.0, 0.0]
    batch = Batch(
        pixel_values=torch.empty(4, 0),
        labels=torch.tensor(labels),
        weights=torch.tensor(weights),
        indices=torch.arange(4),
        partner_labels=torch.tensor(partners),
        shares=torch.tensor(shares),
    )
    targets = np.zeros((4, 3))
    for row in range(4):
        targets[row, labels[row]] += shares[row]
        targets[row, partners[row]] += 1 - shares[row]
    targets = targets * (1 - smoothing) + smoothing / 3
    expected = -(targets * _log_softmax(logits)).sum(axis=1) * weights
    actual = Loss(smoothing).of_samples(torch.tensor(logits, dtype=torch.float32), batch)
    assert actual.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


UPDATES, MICRO_BATCH, ACCUMULATION = 20, 4, 2


class InOrder(Trainer):
    """A Trainer that takes the samples as they come and notes the loss of each micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def _get_train_sampler(self, *_: Any, **__: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def test_twenty_updates_are_those_of_the_trainer_of_transformers(vit: Path, photos: Path, tmp_path: Path) -> None:
    data = load_data(DataSettings(train_dir=str(photos / "train"), validation_dir=str(photos / "validation")), 0)
    augmentation = AugmentationSettings(augmentation="none")
    settings = OptimizationSettings(
        max_train_steps=UPDATES,
        learning_rate=5e-3,
        max_grad_norm=1.0,
        mixed_precision="no",
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=ACCUMULATION,
    )

    ours = Trained(vit)
    images = TrainImages(data.train, ImageTransforms(ours.base.processor, augmentation), augmentation, seed=0)
    # 24 of the 27 samples: whole windows only, since the Trainer would end an epoch's last window elsewhere.
    order = BatchPlan(ShuffledOrder(24, seed=0), MICRO_BATCH, ACCUMULATION, world_size=1, rank=0)
    schedule = Schedule.of(settings, order.steps_per_epoch)
    losses, norms, samples = [], [], []
    for step in range(UPDATES):
        batches = [images.batch(part) for part in order.micro_batches(step)]
        for batch in batches:
            samples += [
                {"pixel_values": pixels, "labels": int(label)}
                for pixels, label in zip(batch.pixel_values, batch.labels, strict=True)
            ]
        update = ours.update(
            batches, order.micro_batches_in(step), order.samples_in(step), learning_rate=schedule.learning_rate(step)
        )
        losses.append(update.loss)
        norms.append(update.grad_norm)

    theirs = Trained(vit).engine.unwrapped
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=UPDATES,
        learning_rate=5e-3,
        lr_scheduler_type="linear",
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=1.0,
        optim="adamw_torch",
        weight_decay=0.0,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
    )
    trainer = InOrder(model=theirs, args=arguments, train_dataset=samples)
    trainer.train()

    per_update = np.array(trainer.losses).reshape(UPDATES, ACCUMULATION).sum(axis=1)
    assert losses == pytest.approx(per_update.tolist(), abs=1e-5)
    assert losses[-1] < losses[0] / 2
    logged = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert norms == pytest.approx([line["grad_norm"] for line in logged], rel=1e-3)
    assert [schedule.learning_rate(step) for step in range(UPDATES)] == pytest.approx(
        [line["learning_rate"] for line in logged]
    )
    expected = {name: tensor.detach() for name, tensor in theirs.named_parameters() if tensor.requires_grad}
    actual = ours.engine.trainable_state()
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=name)


def test_with_class_weights_the_loss_is_the_mean_over_what_could_be_read(vit: Path) -> None:
    """A sample whose partner cannot be read is mixed with itself, and has the weight of its own label alone."""
    batch = _batch(4)
    loss = Loss(class_weights=torch.tensor([0.5, 2.0, 7.0]))
    planned = torch.tensor([1, 1, 2, 0])
    mixed = batch._replace(
        labels=torch.tensor([0, 1, 2, 2]),
        partner_labels=torch.tensor([1, 1, 2, 2]),  # the partner of the last one cannot be read
        shares=torch.tensor([0.3, 0.6, 0.5, 0.2]),
        weights=torch.tensor([1.0, 0.0, 1.0, 1.0]),
        unreadable=torch.tensor([False, True, False, False]),
    )
    total = float(loss.weights_of(mixed.labels, planned, mixed.shares).sum())
    trained = Trained(vit)
    with torch.no_grad():
        logits = trained.engine.model(pixel_values=mixed.pixel_values).logits
    weights = loss.weights_of(mixed.labels, mixed.partner_labels, mixed.shares)[[0, 2, 3]]
    expected = loss.of_samples(logits, mixed).sum() / weights.sum()
    update = trained.update([mixed], 1, total, loss=loss)
    assert update.loss == pytest.approx(float(expected), rel=1e-5)
    assert update.unreadable == 1
