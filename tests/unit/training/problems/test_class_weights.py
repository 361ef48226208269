"""Class weights and focal loss: exact however an update is split, and normalized over all of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_dist_testing.tiny import make_folder
from torch.nn.functional import cross_entropy
from transformers import ViTImageProcessor

from lora_dist.data.batch import Batch, TrainImages
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sampling.balanced import BalancedOrder
from lora_dist.data.sampling.order import BatchPlan, SampleOrder, ShuffledOrder
from lora_dist.data.sources.load import ImageData, load_data
from lora_dist.data.sources.oversampled import OversampledSplit
from lora_dist.errors import UserError
from lora_dist.settings.train import AugmentationSettings, DataSettings, OptimizationSettings, Settings
from lora_dist.training.assembly import _facts
from lora_dist.training.identity import differences
from lora_dist.training.problems.class_weights import balanced_weights, make_loss, planned_weight, read_weights
from lora_dist.training.problems.loss import Loss

WEIGHTS = torch.tensor([0.5, 2.0, 7.0])


def _batch(count: int, mixed: bool) -> tuple[torch.Tensor, Batch]:
    random = torch.Generator().manual_seed(0)
    labels, partners = torch.randint(3, (2, count), generator=random)
    batch = Batch(torch.empty(count, 0), labels, torch.ones(count), torch.arange(count))
    if mixed:
        batch = batch._replace(partner_labels=partners, shares=torch.rand(count, generator=random))
    return torch.randn(count, 3, generator=random), batch


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_an_update_is_the_weighted_mean_of_torch(smoothing: float) -> None:
    logits, batch = _batch(12, mixed=False)
    loss = Loss(smoothing, WEIGHTS)
    total = loss.weights_of(batch.labels).sum()
    parts = [
        loss.of_samples(logits[rows], Batch(*(field[rows] for field in batch[:4]))) for rows in ([0], range(1, 12))
    ]
    expected = cross_entropy(logits, batch.labels, WEIGHTS, label_smoothing=smoothing)
    torch.testing.assert_close(sum(part.sum() for part in parts) / total, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixed_images_take_the_weights_of_both_labels(smoothing: float) -> None:
    logits, batch = _batch(12, mixed=True)
    assert batch.partner_labels is not None
    assert batch.shares is not None
    loss = Loss(smoothing, WEIGHTS)
    # torch takes probabilities as targets, and weights each class of them.
    shares = batch.shares[:, None]
    one_hot = torch.eye(3)
    targets = shares * one_hot[batch.labels] + (1 - shares) * one_hot[batch.partner_labels]
    expected = cross_entropy(logits, targets, WEIGHTS, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss.of_samples(logits, batch), expected)
    weights = loss.weights_of(batch.labels, batch.partner_labels, batch.shares)
    torch.testing.assert_close(weights, targets @ WEIGHTS)


def test_focal_loss_by_hand() -> None:
    logits, batch = _batch(12, mixed=False)
    own = logits.softmax(-1)[torch.arange(12), batch.labels]
    actual = Loss(focal_gamma=2.0).of_samples(logits, batch)
    torch.testing.assert_close(actual, -((1 - own) ** 2) * own.log())
    sure = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    loss = Loss(focal_gamma=0.5).of_samples(sure, Batch(torch.empty(1, 0), torch.tensor([0]), *torch.ones(2, 1)))
    loss.sum().backward()
    assert sure.grad is not None
    assert sure.grad.isfinite().all()


def _images(root: Path, order: str, **augmentation: Any) -> tuple[TrainImages, SampleOrder, np.ndarray]:
    for name, count in (("a", 9), ("b", 3), ("c", 1)):
        make_folder(root, classes=(name,), per_class=count)
    split = load_data(DataSettings(train_dir=str(root), validation_dir=str(root)), 0).train
    augmented = AugmentationSettings(**augmentation)
    transforms = ImageTransforms(ViTImageProcessor(size={"height": 16, "width": 16}), augmented)
    used = OversampledSplit(split) if order == "balanced" else split  # type: ignore[arg-type]
    return TrainImages(used, transforms, augmented, 5), used.sample_order(5), split.labels  # type: ignore[attr-defined]


@pytest.mark.parametrize("order", ["shuffled", "balanced"])
@pytest.mark.parametrize("mixing", [{}, {"mixup_alpha": 1.0, "cutmix_alpha": 1.0}], ids=["plain", "mixed"])
def test_the_planned_weight_is_that_of_the_batches_of_all_processes(
    mixing: dict[str, Any], order: str, tmp_path: Path
) -> None:
    images, samples, _ = _images(tmp_path, order, **mixing)
    loss = Loss(class_weights=WEIGHTS)
    for step in range(5):
        totals = []
        for batch, accumulation, world in ((4, 1, 1), (1, 4, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)):
            plans = [BatchPlan(samples, batch, accumulation, world, rank) for rank in range(world)]
            planned = sum(planned_weight(loss, images, plan, step) for plan in plans)
            batches = [images.batch(part) for plan in plans for part in plan.micro_batches(step)]
            actual = sum(
                (loss.weights_of(one.labels, one.partner_labels, one.shares) * one.weights).sum() for one in batches
            )
            assert planned == pytest.approx(float(actual), rel=1e-5)
            totals.append(planned)
        assert totals == pytest.approx([totals[0]] * 5, rel=1e-6)


def test_balanced_weights_give_each_class_the_same_sum() -> None:
    labels = np.repeat([0, 1, 3], [50, 5, 1])
    weights = balanced_weights(labels, 4)
    sums = np.bincount(labels, weights.numpy()[labels])
    assert sums[[0, 1, 3]] == pytest.approx([56 / 3] * 3)
    assert weights[2] == 1


def test_a_file_of_weights_is_read_or_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "weights.yaml"
    file.write_text("no: 1\n'7': 2.5\nrose: 3\n")
    assert read_weights(str(file), ["7", "no", "rose"]).tolist() == [2.5, 1.0, 3.0]
    file.write_text('{"7": 2.5, "no": 1, "rose": 3}')
    assert read_weights(str(file), ["7", "no", "rose"]).tolist() == [2.5, 1.0, 3.0]
    for labels, content, message in (
        (["no", "tulip"], "no: 1", "no weight for tulip"),
        (["no"], "no: 1\ntulip: 1", "unknown classes tulip"),
        (["no"], "no: -1", "the weight of no is -1, not a positive number"),
        (["no"], "no: many", "not a positive number"),
        (["no"], "- no", "expected one line for each class"),
        (["no"], "{", "not a YAML or JSON file"),
        (["no"], '{"no": 1, "no": 2}', "no is set on line 1 and again on line 1"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_weights(str(file), labels)
    with pytest.raises(UserError, match="the values are none, balanced, or a file"):
        read_weights(str(tmp_path / "missing"), ["no"])


def test_the_settings_make_the_loss(tmp_path: Path) -> None:
    split = load_data(DataSettings(train_dir=str(make_folder(tmp_path)), validation_dir=str(tmp_path)), 0).train
    data = ImageData(["a", "b", "c"], split, split)  # type: ignore[arg-type]
    settings = Settings(
        optimization=OptimizationSettings(class_weights="balanced", focal_gamma=2),
        augmentation=AugmentationSettings(label_smoothing_factor=0.1),
    )
    made = make_loss(settings, data)
    assert (made.label_smoothing, made.focal_gamma) == (0.1, 2)
    assert made.class_weights is not None
    assert make_loss(Settings(), data) == Loss()


def test_a_checkpoint_without_the_record_was_trained_without_weights() -> None:
    now = {"class_weights": "balanced", "focal_gamma": 0.0}
    assert list(differences({}, now)) == ["class_weights was none and is now balanced"]
    assert list(differences(now, now)) == []


def test_other_samples_of_an_older_release_are_explained() -> None:
    saved = {"train_data": "1"}
    found = list(differences(saved, {"train_data": "2"}))
    assert found[0].startswith("train_data was 1 and is now 2 (images and labels, --exclude, ")
    assert "older release" in found[1]
    assert "--max_train_samples" in found[1]
    assert len(list(differences({**saved, "conversion": {}}, {"train_data": "2", "conversion": {}}))) == 1


def test_a_balanced_epoch_has_each_class_equally_often_and_repetitions_are_samples_of_their_own() -> None:
    labels = np.repeat([0, 1, 2], [50, 6, 1])
    order = BalancedOrder(labels, seed=3)
    seen: list[int] = []
    for epoch in range(6):
        samples = [sample for part in order.micro_batches(epoch, range(57), 57, 1, 0) for sample in part]
        indices = [sample.index for sample in samples]
        assert len(set(indices)) == 57
        assert np.bincount(labels[np.array(indices) % 57]).tolist() == [19, 19, 19]
        assert {sample.partner for sample in samples} <= set(indices)
        seen += [index % 57 for index in indices if index % 57 < 50]
    # A large class takes turns: after 6 * 19 draws, each of the 50 came twice or three times.
    assert set(np.bincount(seen)) == {2, 3}
    again = [s for part in BalancedOrder(labels, seed=3).micro_batches(5, range(57), 57, 1, 0) for s in part]
    assert again == samples
    assert isinstance(order._positions, ShuffledOrder)


def test_a_balanced_update_has_the_same_samples_however_it_is_split() -> None:
    labels = np.repeat([0, 1], [40, 3])

    def indices(batch: int, accumulation: int, world: int, step: int) -> list[int]:
        plans = [BatchPlan(BalancedOrder(labels, 1), batch, accumulation, world, rank) for rank in range(world)]
        return sorted(s.index for plan in plans for part in plan.micro_batches(step) for s in part if s.weight)

    for step in (0, 3, 7):
        assert indices(8, 1, 1, step) == indices(2, 4, 1, step) == indices(2, 2, 2, step) == indices(2, 1, 4, step)


def test_repetitions_of_an_image_are_augmented_differently(tmp_path: Path) -> None:
    images, order, labels = _images(tmp_path, "balanced", crop_scale_min=0.2)
    plan = BatchPlan(order, 13, 1, 1, 0)
    (samples,) = plan.micro_batches(0)
    batch = images.batch(samples)
    only = [position for position, sample in enumerate(samples) if labels[sample.index % 13] == 2]
    assert len(only) >= 4
    views = batch.pixel_values[only]
    assert len({view.numpy().tobytes() for view in views}) == len(only)
    assert images.split.name(samples[only[0]].index) == images.split.name(samples[only[1]].index)


def test_processes_agree_on_the_content_of_a_file_of_weights(tmp_path: Path) -> None:
    """Its path may be the same on machines where its content is not."""
    data = load_data(DataSettings(train_dir=str(make_folder(tmp_path / "train"))), seed=0)
    settings = Settings(optimization=OptimizationSettings(class_weights="weights.yaml"))
    assert _facts(settings, {"class_weights": "file 12ab"}, data, None)["class_weights"] == "file 12ab"
