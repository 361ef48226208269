"""A greedy soup: which adapters it takes, and how accuracy on folders of classes is counted."""

from pathlib import Path

import pytest
import torch
from lora_dist_testing.tiny import make_image, write_bundle
from safetensors.torch import load_file, save_file

from lora_dist.deployment import soup
from lora_dist.deployment.classify import Inference, classify
from lora_dist.errors import UserError
from lora_dist.model.trained.adapter_set import load_weighted_sum
from lora_dist.model.trained.classifier import Classifier, load_classifier

LABELS = ["x", "y"]
CPU = torch.device("cpu")


def _accuracy(classifier: Classifier, files: list[str], root: Path | None = None) -> float:
    root = root or Path(files[0]).parents[1]
    return soup.accuracy(classifier, str(root), files, Inference(CPU, batch_size=4, num_workers=0))


def _opposite(adapter: Path, directory: Path) -> None:
    """Writes an adapter whose head has the other sign, and twice the weights."""
    directory.mkdir()
    for file in adapter.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    weights = directory / "adapter_model.safetensors"
    state = {name: -3 * tensor if "classifier" in name else tensor for name, tensor in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})


@pytest.fixture
def adapters(vit: Path, tmp_path: Path) -> dict[str, Path]:
    """A good adapter twice, and in front one that is wrong about everything."""
    found = {name: tmp_path / name for name in ("bad", "good", "copy")}
    for name in ("good", "copy"):
        write_bundle(found[name], vit, LABELS, seed=1, scale=0.5, lora_r=4)
    _opposite(found["good"], found["bad"])
    return found


@pytest.fixture
def files(adapters: dict[str, Path], tmp_path: Path) -> list[str]:
    """Images in folders named as the good adapter classifies them."""
    images = []
    for number in range(12):
        images.append(tmp_path / f"{number}.png")
        make_image(number % 3, number).save(images[-1])
    rows = classify(
        load_classifier(adapters["good"]), list(map(str, images)), Inference(CPU, batch_size=4, num_workers=0), top_k=1
    )
    for row in rows:
        folder = tmp_path / "validation" / row.top_k[0][0]
        folder.mkdir(parents=True, exist_ok=True)
        Path(row.path).rename(folder / Path(row.path).name)
    return sorted(map(str, (tmp_path / "validation").rglob("*.png")))


def test_a_greedy_soup_leaves_out_what_makes_it_worse(adapters: dict[str, Path], files: list[str]) -> None:
    alone = {name: _accuracy(load_classifier(path), files) for name, path in adapters.items()}
    assert alone == {"bad": 0, "good": 1, "copy": 1}
    assert soup.greedy(adapters, load_weighted_sum, lambda model: _accuracy(model, files)) == ["good", "copy"]


def test_a_greedy_soup_starts_with_the_best(adapters: dict[str, Path], files: list[str]) -> None:
    pair = {name: adapters[name] for name in ("bad", "good")}
    assert soup.greedy(pair, load_weighted_sum, lambda model: _accuracy(model, files)) == ["good"]


def test_images_outside_folders_of_classes_do_not_count(
    adapters: dict[str, Path], files: list[str], tmp_path: Path
) -> None:
    model = load_classifier(adapters["good"])
    make_image(0, 0).save(tmp_path / "loose.png")
    (Path(files[0]).parent / "broken.png").write_bytes(b"broken")
    more = [*files, str(tmp_path / "loose.png"), str(Path(files[0]).parent / "broken.png")]
    assert _accuracy(model, more) == 1
    with pytest.raises(UserError, match="needs readable images in folders named after the classes"):
        _accuracy(model, [str(tmp_path / "loose.png")])
    with pytest.raises(UserError, match="needs readable images in folders named after the classes"):
        _accuracy(model, files[:1], root=Path(files[0]).parent)
