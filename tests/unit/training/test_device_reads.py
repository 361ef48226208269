"""An update reads from the device once, however many micro-batches it has: each read would wait for a GPU."""

import sys
from pathlib import Path

import pytest
import torch
from lora_dist_testing.tiny import perturb

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from device_reads import Reads

from lora_dist.data.batch import Batch
from lora_dist.engines.engine import make_engine
from lora_dist.model.base.backbone import load_base
from lora_dist.model.lora.trainable import make_trainable, set_training
from lora_dist.processes.runtime import launch
from lora_dist.settings.train import LoraSettings, ModelSettings, OptimizationSettings
from lora_dist.training.optimizer import make_optimizer
from lora_dist.training.problems.loss import Loss
from lora_dist.training.step import GradientAccumulator, make_update


def test_reads_are_counted() -> None:
    numbers = torch.arange(3.0)
    with Reads() as reads:
        float(numbers.sum())
        assert numbers[0] < 1
        numbers.tolist()
        numbers.cpu()
        numbers[numbers > 1]
        numbers + 1
    assert len(reads.where) == 5
    assert all(Path(place.partition(":")[0]).name == Path(__file__).name for place in reads.where)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_update_reads_once(micro_batches: int, dropout: float, vit: Path) -> None:
    base = load_base(str(vit), ["x", "y"])
    model = make_trainable(base, ModelSettings(), LoraSettings(lora_r=2, lora_dropout=dropout))
    perturb(model, 0, scale=0.1)
    settings = OptimizationSettings(mixed_precision="no")
    engine = make_engine(launch("no"), model, make_optimizer(model, settings, 1.0, base.heads), settings)
    set_training(engine.model)
    batch = Batch(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), torch.ones(2), torch.arange(2))
    batch = batch._replace(unreadable=torch.zeros(2, dtype=torch.bool))
    for _ in range(2):  # The first update makes AdamW's moments.
        with Reads() as reads:
            gradient = GradientAccumulator(
                engine,
                micro_batch_count=micro_batches,
                total_weight=2 * micro_batches,
                learning_rate=1e-3,
                loss=Loss(label_smoothing=0.1, class_weights=torch.tensor([0.5, 1.5]), focal_gamma=1.0),
                dropout_seed=(0,),
            )
            make_update(gradient, iter([batch] * micro_batches), 1.0)
    assert len(reads.where) == 1, reads.where
    assert "training/step.py" in reads.where[0]
