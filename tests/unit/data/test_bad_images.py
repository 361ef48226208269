"""An image that cannot be read is left out and counted with --on_bad_image skip, and changes nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_dist_testing.launching import flags, lines_of, results_of, run_flags, train
from lora_dist_testing.tiny import make_folder, perturb
from PIL import Image
from transformers import BitImageProcessor, ViTImageProcessor

from lora_dist.data.batch import Batch, EvaluationImages, TrainImages
from lora_dist.data.loader import batches, train_loader
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sampling.order import BatchPlan, Sample, ShuffledOrder
from lora_dist.data.sources.load import load_data
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import load_base
from lora_dist.model.lora.trainable import make_trainable
from lora_dist.processes.runtime import launch
from lora_dist.settings.train import AugmentationSettings, DataSettings, LoraSettings, ModelSettings
from lora_dist.train import main
from lora_dist.training.evaluation import Evaluator
from lora_dist.training.problems.problem import worst_samples
from lora_dist.training.problems.single_label_problem import SingleLabelEvaluation

CPU = torch.device("cpu")


def _spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def _batches(root: Path, world: int = 1, rank: int = 0, workers: int = 0, **augmentation: Any) -> list[Batch]:
    """Two epochs of a folder."""
    settings = DataSettings(train_dir=str(root), validation_dir=str(root), dataloader_num_workers=workers)
    split = load_data(settings, seed=0).train
    augmented = AugmentationSettings(**augmentation)
    transforms = ImageTransforms(ViTImageProcessor(size={"height": 16, "width": 16}), augmented)
    order = BatchPlan(ShuffledOrder(len(split), seed=3), 4, 1, world, rank)
    images = TrainImages(split, transforms, augmented, 3, skip_bad_images=True)
    return list(batches(train_loader(images, order, 0, 2 * order.steps_per_epoch, settings, CPU)))


def test_an_image_that_is_too_long_and_thin_is_left_out(tmp_path: Path) -> None:
    make_folder(tmp_path, per_class=3)
    Image.new("RGB", (7, 100_001)).save(tmp_path / "b" / "001.png")
    split = load_data(DataSettings(train_dir=str(tmp_path), validation_dir=str(tmp_path)), seed=0).train
    transforms = ImageTransforms(BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}))
    indices = list(range(len(split)))
    evaluated = EvaluationImages(split, transforms, skip_bad_images=True).__getitems__(indices)
    assert isinstance(evaluated, Batch)
    trained = TrainImages(split, transforms, AugmentationSettings(augmentation="none"), 0, skip_bad_images=True)
    weights = trained.prepared([Sample(0, index, index, index) for index in indices]).weights
    assert evaluated.weights.tolist() == weights.tolist() == [float(index != 4) for index in indices]


@pytest.mark.parametrize("mixing", [{}, {"mixup_alpha": 1.0, "cutmix_alpha": 1.0}], ids=["plain", "mixed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_all_other_samples_stay_what_and_where_they_are(workers: int, mixing: dict[str, Any], tmp_path: Path) -> None:
    make_folder(tmp_path, per_class=3)
    before = _batches(tmp_path, workers=workers, **mixing)
    _spoil(tmp_path / "b" / "001.png")
    after = _batches(tmp_path, workers=workers, **mixing)
    bad, changed = 4, 0
    for old, new in zip(before, after, strict=True):
        assert old.unreadable is not None
        assert new.unreadable is not None
        assert not old.unreadable.any()
        assert new.indices.equal(old.indices)
        assert new.labels.equal(old.labels)
        assert new.unreadable.equal(new.indices == bad)
        assert new.weights.equal((new.indices != bad).float())
        assert not new.pixel_values[new.unreadable].any()
        # With mixing, the neighbour of the bad one is left unmixed.
        changed += sum(
            not torch.equal(one, other)
            for one, other, out in zip(old.pixel_values, new.pixel_values, new.unreadable, strict=True)
            if not out
        )
        assert new.pixel_values.isfinite().all()
    assert sum(int(batch.unreadable.sum()) for batch in after if batch.unreadable is not None) == 2
    assert changed == (2 if mixing else 0)


def test_a_sample_that_is_read_by_two_processes_is_counted_once(tmp_path: Path) -> None:
    """The last one of an epoch is read by a process that has nothing of its own as well."""
    make_folder(tmp_path, classes=("a",), per_class=9)
    for path in (tmp_path / "a").iterdir():
        _spoil(path)
    shares = [_batches(tmp_path, world=2, rank=rank) for rank in (0, 1)]
    marks = [batch.unreadable for share in shares for batch in share]
    assert sum(int(mark.sum()) for mark in marks if mark is not None) == 2 * 9


def _evaluation(root: Path, vit: Path, **settings: Any) -> SingleLabelEvaluation:
    data = load_data(DataSettings(train_dir=str(root / "train"), validation_dir=str(root / "validation")), seed=0)
    base = load_base(str(vit), data.labels)
    perturb(make_trainable(base, ModelSettings(tuning="full"), LoraSettings()))
    transforms = ImageTransforms(base.processor)
    accelerator = launch("no")
    model = base.model.to(accelerator.device)
    return Evaluator(accelerator, model, data.validation, transforms, data.labels, 4, DataSettings(**settings))()


def test_an_evaluation_is_that_of_the_images_that_can_be_read(vit: Path, tmp_path: Path) -> None:
    for name, numbers in (("whole", 4), ("without", 4)):
        make_folder(tmp_path / name / "train", per_class=2)
        make_folder(tmp_path / name / "validation", per_class=numbers)
    _spoil(tmp_path / "whole" / "validation" / "b" / "002.png")
    (tmp_path / "without" / "validation" / "b" / "002.png").unlink()
    found = _evaluation(tmp_path / "whole", vit, on_bad_image="skip")
    expected = _evaluation(tmp_path / "without", vit)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
    assert (found.num_samples, expected.num_samples) == (11, 11)
    assert np.flatnonzero(found.predictions < 0).tolist() == [6]
    assert np.delete(found.predictions, 6).tolist() == expected.predictions.tolist()
    assert sorted(worst_samples(found.losses, 100)) == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    with pytest.raises(UserError, match=r"b/002\.png.*--on_bad_image skip"):
        _evaluation(tmp_path / "whole", vit)


def test_two_processes_train_as_one_around_bad_images(vit: Path, tmp_path: Path) -> None:
    """One bad image is the first of the validation data, which the hand-over looks at."""
    make_folder(tmp_path / "train", per_class=5)
    make_folder(tmp_path / "validation", per_class=3, first=100)
    bad = [tmp_path / "train" / "b" / "002.png", tmp_path / "validation" / "a" / "100.png"]
    for path in bad:
        _spoil(path)
    runs = {}
    for name, launch_file, batch in (("one", None, 4), ("two", "ddp_cpu.yaml", 2)):
        result = train(
            *run_flags(
                vit,
                tmp_path,
                tmp_path / name,
                per_device_train_batch_size=batch,
                num_train_epochs=2,
                logging_steps=1,
                lora_dropout=0,
                on_bad_image="skip",
            ),
            launch_file=launch_file,
        )
        assert all(f"skipped an image that cannot be read: {path}" in result.stderr for path in bad)
        runs[name] = tmp_path / name
    losses = {
        name: [line["train/loss"] for line in lines_of(run) if "train/loss" in line] for name, run in runs.items()
    }
    assert len(losses["one"]) == 8
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    for run in runs.values():
        results = results_of(run)
        assert results["unreadable_images"] == {"train": 2, "validation": 1}
        assert (results["train_samples"], results["eval_samples"]) == (15, 8)


def _run(vit: Path, root: Path, *more: object) -> None:
    main(
        [
            *run_flags(
                vit,
                root,
                root / "run",
                per_device_train_batch_size=4,
                num_train_epochs=2,
                dataloader_num_workers=0,
                on_bad_image="skip",
            ),
            *map(str, more),
        ]
    )


@pytest.mark.parametrize("more", [(), ("--max_train_steps", 2)], ids=["an epoch", "fewer updates"])
def test_a_run_that_can_read_nothing_does_not_pass_for_one_that_trained(
    more: tuple[object, ...], vit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "validation", per_class=1, first=100)
    for path in make_folder(tmp_path / "train", per_class=4).rglob("*.png"):
        _spoil(path)
    with pytest.raises(SystemExit) as end:
        _run(vit, tmp_path, *more)
    assert end.value.code == 1
    updates = 2 if more else 3
    assert f"no image could be read in the last {updates} updates" in capfd.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()


def test_one_image_in_an_epoch_is_enough_to_go_on(vit: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "validation", per_class=1, first=100)
    for path in list(make_folder(tmp_path / "train", per_class=4).rglob("*.png"))[1:]:
        _spoil(path)
    _run(vit, tmp_path)
    assert results_of(tmp_path / "run")["unreadable_images"]["train"] == 22


def test_an_epoch_is_not_lost_where_no_validation_image_can_be_read(
    vit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "train", per_class=4)
    for path in make_folder(tmp_path / "validation", per_class=1, first=100).rglob("*.png"):
        _spoil(path)
    with pytest.raises(SystemExit) as end:
        _run(vit, tmp_path)
    assert end.value.code == 1
    said = capfd.readouterr().err
    assert "none of the validation images can be read" in said
    assert "--resume_from_checkpoint auto resumes from update 3" in said
    make_folder(tmp_path / "validation", per_class=1, first=100)
    _run(vit, tmp_path, "--resume_from_checkpoint", "auto")
    assert [line["step"] for line in lines_of(tmp_path / "run") if "eval/loss" in line] == [3, 6]


def test_a_bad_image_among_the_first_inputs_ends_the_run_too(vit: Path, photos: Path, tmp_path: Path) -> None:
    """These are shown in TensorBoard before the first update."""
    make_folder(tmp_path / "train", per_class=2)
    for path in (tmp_path / "train").rglob("*.png"):
        _spoil(path)
    result = train(
        *flags(
            model_name_or_path=vit,
            train_dir=tmp_path / "train",
            validation_dir=photos / "validation",
            output_dir=tmp_path / "run",
            num_train_epochs=1,
        ),
        code=2,
    )
    assert "cannot read an image" in result.stderr
    assert "--on_bad_image skip" in result.stderr
    assert "Traceback" not in result.stderr
    assert "each epoch is one update: the 6 training images are fewer than" in result.stderr
