"""Several labels: the loss is that of torch and exact however it is split, and evaluations are whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lora_dist.data.batch import Batch
from lora_dist.data.sources.load import ImageData
from lora_dist.data.sources.split import Split
from lora_dist.metrics.predictions import read_predictions
from lora_dist.model.trained.decision import AboveThresholds
from lora_dist.settings.train import AugmentationSettings, DataSettings, OptimizationSettings, Settings
from lora_dist.training.identity import differences
from lora_dist.training.problems.binary_loss import BinaryLoss, balanced_positive_weights
from lora_dist.training.problems.multi_label_problem import MultiLabel
from lora_dist.training.problems.problem import worst_samples
from lora_dist.training.problems.problem_types import PROBLEM_TYPES

NAMES = ["bird", "cat", "dog"]
WEIGHTS = torch.tensor([0.5, 2.0, 7.0])


def _batch(count: int, mixed: bool = False) -> tuple[Tensor, Batch]:
    random = torch.Generator().manual_seed(0)
    labels, partners = torch.randint(2, (2, count, 3), generator=random, dtype=torch.uint8)
    batch = Batch(torch.empty(count, 0), labels, torch.ones(count), torch.arange(count))
    if mixed:
        batch = batch._replace(partner_labels=partners, shares=torch.rand(count, generator=random))
    return torch.randn(count, 3, generator=random), batch


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_an_update_is_the_mean_of_torch(weights: Tensor | None, mixed: bool, smoothing: float) -> None:
    """As `transformers` computes it, of targets that are mixed and smoothed."""
    logits, batch = _batch(12, mixed)
    targets = batch.labels.float()
    if batch.partner_labels is not None and batch.shares is not None:
        share = batch.shares[:, None]
        targets = share * targets + (1 - share) * batch.partner_labels.float()
    targets = targets * (1 - smoothing) + smoothing / 2
    expected = binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
    loss = BinaryLoss(smoothing, weights)
    parts = []
    for rows in ([0], list(range(1, 12))):
        fields = [None if field is None else field[rows] for field in batch]
        parts.append(loss.of_samples(logits[rows], Batch(*fields)).sum())  # type: ignore[arg-type]
    torch.testing.assert_close(sum(parts) / 12, expected)
    assert not loss.weighs_samples
    assert loss.weights_of(batch.labels).tolist() == [1.0] * 12


def test_a_sample_of_weight_0_counts_for_nothing() -> None:
    logits, batch = _batch(2)
    losses = BinaryLoss().of_samples(logits, batch._replace(weights=torch.tensor([1.0, 0.0])))
    assert losses[0] > 0
    assert losses[1] == 0


def test_balanced_weights_are_negatives_by_positives() -> None:
    labels = np.array([[1, 0, 1, 0], [0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]], np.uint8)
    assert balanced_positive_weights(labels).tolist() == [3.0, 1.0, 1.0, 1.0]


def _split(labels: list[list[int]]) -> Split:
    table = Dataset.from_dict({"image": ["x"] * len(labels)})
    return Split(table, "image", np.arange(len(labels)), np.array(labels, np.uint8))


def test_the_settings_make_the_loss(tmp_path: Any) -> None:
    split = _split([[1, 0, 1], [0, 0, 1], [0, 1, 1], [0, 1, 1]])
    data = ImageData(NAMES, split, split)
    several = DataSettings(problem_type="multi_label_classification")
    smoothed = AugmentationSettings(label_smoothing_factor=0.1)
    (tmp_path / "weights.yaml").write_text("bird: 2\ncat: 3\ndog: 4\n")
    for given, weights in (
        ("none", None),
        ("balanced", [3.0, 1.0, 1.0]),
        (str(tmp_path / "weights.yaml"), [2.0, 3.0, 4.0]),
    ):
        settings = Settings(data=several, augmentation=smoothed, optimization=OptimizationSettings(class_weights=given))
        loss = PROBLEM_TYPES[several.problem_type].loss(settings, data)
        assert isinstance(loss, BinaryLoss)
        assert loss.label_smoothing == 0.1
        assert (None if loss.positive_weights is None else loss.positive_weights.tolist()) == weights


LOGITS = torch.tensor([[3.0, -3.0, -1.0], [2.0, -2.0, -2.0], [-2.0, torch.nan, 1.0], [-1.0, 2.0, -1.5]])
TRUE = [[1, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0], [1, 1, 1]]


def _evaluated(problem: MultiLabel, sites: np.ndarray | None = None, groups: np.ndarray | None = None) -> Any:
    """Of five images, the last of which could not be read, and the third has no finite logits."""
    split = replace(_split(TRUE), groups=groups, slices={} if sites is None else {"site": sites})
    batch = Batch(torch.empty(4, 0), torch.from_numpy(split.labels[:4]), torch.ones(4), torch.arange(4))
    integers, reals = problem.results(LOGITS, batch)
    return split, problem.evaluation(split, NAMES, integers.numpy(), reals.numpy())


def test_an_evaluation_chooses_thresholds_and_keeps_the_scores() -> None:
    problem = MultiLabel()
    split, found = _evaluated(problem)
    assert found.num_samples == 4
    assert np.isnan(found.losses).tolist() == [False, False, True, False, True]
    torch.testing.assert_close(torch.from_numpy(found.scores[:2]), LOGITS[:2].sigmoid())
    expected = binary_cross_entropy_with_logits(LOGITS[0], torch.tensor([1.0, 0, 1]))
    assert found.losses[0] == pytest.approx(float(expected))
    assert np.isnan(found.metrics["loss"])
    assert worst_samples(found.losses, 9) == [0, 3, 1]
    assert 0.27 < found.thresholds[0] < 0.88
    assert found.per_class[0]["f1"] == 1
    assert problem.answers(found, split, [1, 3], NAMES) == ["is bird\npredicted bird", "is cat\npredicted cat"]
    assert problem.caption(np.array([0, 0, 0]), NAMES) == "(none)"
    assert problem.pictures(found, NAMES) == {}
    chance, _ = problem.chance_level(found)
    assert chance == pytest.approx((2 + 2 + 1) / 12)


def test_intervals_slices_and_predictions_are_of_the_images_that_could_be_read(tmp_path: Path) -> None:
    split, found = _evaluated(MultiLabel(), np.array(["x", "x", "y", "y", "y"]), np.array(["p", "p", "q", "r", "r"]))
    assert set(found.intervals) == {"mAP", "micro_f1", "macro_f1"}
    assert {site: row["num_samples"] for site, row in found.slices["site"].items()} == {"x": 2, "y": 2}
    assert found.slices["site"]["x"]["mAP"] == 1
    MultiLabel().write_predictions(tmp_path / "rows.jsonl", found, split, NAMES)
    written = read_predictions(tmp_path / "rows.jsonl")
    assert written.paths == ["row 0", "row 1", "row 2", "row 3"]
    assert written.given == [("bird", "dog"), ("bird",), ("cat",), ("cat",)]
    assert written.predicted[2] == ()
    assert written.groups == ["p", "p", "q", "r"]
    assert written.probabilities is not None
    np.testing.assert_allclose(written.probabilities, found.scores[:4], atol=1e-6)


def test_test_data_is_measured_with_the_thresholds_of_validation() -> None:
    _, chosen = _evaluated(MultiLabel())
    _, found = _evaluated(MultiLabel().fixed(AboveThresholds((0.99, 0.01, 0.5))))
    assert found.thresholds.tolist() == pytest.approx([0.99, 0.01, 0.5])
    assert found.metrics["mAP"] == chosen.metrics["mAP"]
    assert found.metrics["macro_f1"] < chosen.metrics["macro_f1"]


def test_the_problem_type_is_part_of_the_identity() -> None:
    """A checkpoint of an older release has one class per image."""
    now = {"problem_type": "multi_label_classification"}
    for saved in ({}, {"problem_type": "single_label_classification"}):
        assert list(differences(saved, now)) == [
            "problem_type was single_label_classification and is now multi_label_classification"
        ]
    assert not list(differences({}, {"problem_type": "single_label_classification"}))
