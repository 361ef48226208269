"""An evaluation is what scikit-learn and plain torch say of the same images, whatever the size of a batch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_dist_testing.tiny import perturb
from sklearn import metrics as sklearn
from torch import nn

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sources.load import ImageData, load_data
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import Base, load_base
from lora_dist.model.lora.trainable import make_trainable
from lora_dist.processes.runtime import launch
from lora_dist.settings.train import DataSettings, LoraSettings, ModelSettings, OptimizationSettings, Settings
from lora_dist.training.evaluation import Evaluator
from lora_dist.training.problems.problem import worst_samples
from lora_dist.training.problems.single_label_problem import SingleLabel, SingleLabelEvaluation


@pytest.fixture(scope="module")
def data(photos: Path) -> ImageData:
    """The 27 images of the training folder as validation, since there are more of them and unevenly many a class."""
    return load_data(DataSettings(train_dir=str(photos / "validation"), validation_dir=str(photos / "train")), seed=1)


@pytest.fixture(scope="module")
def base(vit: Path) -> Base:
    base = load_base(str(vit), ["a", "b", "c"])
    perturb(make_trainable(base, ModelSettings(tuning="full"), LoraSettings()))
    return base


def evaluator(model: nn.Module, base: Base, data: ImageData, batch_size: int = 8) -> Evaluator:
    accelerator, transforms = launch("no"), ImageTransforms(base.processor)
    model = model.to(accelerator.device)
    return Evaluator(accelerator, model, data.validation, transforms, data.labels, batch_size, DataSettings())


@pytest.fixture(scope="module")
def evaluation(base: Base, data: ImageData) -> SingleLabelEvaluation:
    return evaluator(base.model, base, data)()


def test_every_number_is_that_of_scikit_learn_on_the_logits(
    base: Base, data: ImageData, evaluation: SingleLabelEvaluation
) -> None:
    split = data.validation
    pixels = torch.stack([base.processor(split.image(i), return_tensors="pt")["pixel_values"][0] for i in range(27)])
    with torch.inference_mode():
        logits = base.model.eval().cpu()(pixel_values=pixels).logits
    probabilities, true = logits.softmax(-1).numpy(), split.labels
    predicted = probabilities.argmax(1)
    metrics = evaluation.metrics
    assert 0 < metrics["accuracy"] < 1
    assert metrics["accuracy"] == pytest.approx(sklearn.accuracy_score(true, predicted))
    assert metrics["macro_f1"] == pytest.approx(sklearn.f1_score(true, predicted, average="macro"))
    assert metrics["loss"] == pytest.approx(sklearn.log_loss(true, probabilities), rel=1e-4)
    assert "top5_accuracy" not in metrics, "there are three classes"
    expected = sklearn.confusion_matrix(true, predicted)
    assert {(a, b): n for a, b, n in evaluation.confusion.tolist()} == {
        (a, b): expected[a, b] for a, b in zip(*expected.nonzero(), strict=True)
    }
    np.testing.assert_array_equal(evaluation.predictions, predicted)
    np.testing.assert_allclose(evaluation.confidences, probabilities.max(1), rtol=1e-4)
    np.testing.assert_allclose(evaluation.losses, -np.log(probabilities[np.arange(27), true]), rtol=1e-3)
    assert [row["support"] for row in evaluation.per_class] == [11, 9, 7]


def test_images_of_one_class_have_no_chance_level(evaluation: SingleLabelEvaluation) -> None:
    """A model that is right on all of them would be said to have learned little."""
    assert SingleLabel().chance_level(evaluation)[0] == 11 / 27
    of_one = [row | {"support": row["support"] // 11} for row in evaluation.per_class]
    assert np.isnan(SingleLabel().chance_level(replace(evaluation, per_class=of_one))[0])


@pytest.mark.parametrize("batch_size", [1, 4, 27, 100])
def test_the_batch_size_changes_nothing(
    batch_size: int, base: Base, data: ImageData, evaluation: SingleLabelEvaluation
) -> None:
    other = evaluator(base.model, base, data, batch_size)()
    assert other.metrics == pytest.approx(evaluation.metrics, rel=1e-5)
    np.testing.assert_array_equal(other.predictions, evaluation.predictions)
    np.testing.assert_allclose(other.losses, evaluation.losses, rtol=1e-4)


def test_the_worst_images_are_those_with_the_highest_loss(evaluation: SingleLabelEvaluation) -> None:
    worst = worst_samples(evaluation.losses, 5)
    assert len(worst) == 5
    assert evaluation.losses[worst].tolist() == sorted(evaluation.losses.tolist(), reverse=True)[:5]
    assert sorted(worst_samples(evaluation.losses, 100)) == list(range(27))


class Tie(nn.Module):
    """Finds all classes equally likely."""

    def forward(self, pixel_values: torch.Tensor) -> object:
        return type("Output", (), {"logits": pixel_values.new_zeros(len(pixel_values), 3)})


def test_a_model_that_knows_nothing_is_calibrated_at_one_class_in_three(base: Base, data: ImageData) -> None:
    metrics = evaluator(Tie(), base, data)().metrics
    assert metrics["accuracy"] == pytest.approx(11 / 27), "the first class wins a tie"
    assert metrics["loss"] == pytest.approx(np.log(3), rel=1e-5)
    assert metrics["calibration_error"] == pytest.approx(11 / 27 - 1 / 3, abs=1e-5)


class Descending(nn.Module):
    """Finds the last of seven classes likeliest and the first one least likely."""

    def forward(self, pixel_values: torch.Tensor) -> object:
        return type("Output", (), {"logits": torch.arange(7.0).expand(len(pixel_values), 7).to(pixel_values.device)})


def test_the_best_model_is_not_chosen_by_a_metric_that_is_always_1(data: ImageData) -> None:
    settings = Settings(optimization=OptimizationSettings(metric_for_best_model="top5_accuracy"))
    with pytest.raises(UserError, match="it is always 1 with 3 classes; use accuracy"):
        SingleLabel().loss(settings, data)
    SingleLabel().loss(settings, replace(data, labels=list("abcdefg")))


def test_the_fifth_of_seven_classes_is_among_the_first_five_and_the_sixth_is_not(base: Base, data: ImageData) -> None:
    named = replace(data, labels=list("abcdefg"))
    assert evaluator(Descending(), base, named)().metrics["top5_accuracy"] == pytest.approx(7 / 27), "those of class c"


def test_evaluation_is_without_dropout_and_leaves_gradients_and_random_numbers_alone(
    vit: Path, data: ImageData
) -> None:
    base = load_base(str(vit), ["a", "b", "c"])
    model = make_trainable(base, ModelSettings(), LoraSettings(lora_r=4, lora_dropout=0.9))
    perturb(model)
    model.train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (evaluator(model, base, data)().metrics for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.is_inference() for parameter in model.parameters())
