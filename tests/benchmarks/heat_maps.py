"""Measures heat maps on the demo's digits: `python tests/benchmarks/heat_maps.py runs/demo/adapter`.

Prints how much of a map lies on the digit, and how often the predicted class changes when the hottest quarter of the
image, or a random quarter, becomes black.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from lora_dist import demo
from lora_dist.data.sources.image_files import find_files
from lora_dist.model.heat_map import heat_maps
from lora_dist.model.trained.classifier import load_classifier

EVERY = 8
"""Of so many validation images, one is measured."""
INK = 0.25
"""Brightness from which a pixel belongs to the digit."""
PATCH = 4


def quarter(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask [B, 1, H, W] of the patches with the highest of scores [B, h, w]."""
    flat = scores.flatten(1)
    chosen = flat.topk(flat.shape[1] // 4, dim=1).indices
    mask = torch.zeros_like(flat).scatter(1, chosen, 1.0).view_as(scores)
    return interpolate(mask[:, None], size, mode="nearest") > 0


def main(adapter: str) -> None:
    """Prints the figures for an adapter of the demo."""
    classifier = load_classifier(Path(adapter))
    transforms = classifier.transforms()
    files = find_files(demo.local_path("demo:digits/validation"))[0][::EVERY]
    images = transforms.batch([transforms.load(file) for file in files])
    size = (images.shape[2], images.shape[3])
    maps = heat_maps(classifier.model, images)
    brightness = images.mean(dim=1) - images.mean(dim=1).amin(dim=(1, 2), keepdim=True)
    ink = brightness / brightness.amax(dim=(1, 2), keepdim=True) > INK
    share = (maps * ink).sum(dim=(1, 2)) / maps.sum(dim=(1, 2))
    print(f"{len(files)} images: {share.nanmean():.0%} of the map on the digit, which covers {ink.float().mean():.0%}")
    torch.manual_seed(0)
    black = images.amin(dim=(1, 2, 3), keepdim=True)
    with torch.inference_mode():
        predicted = classifier.logits(images).argmax(dim=-1)
        patches = avg_pool2d(maps[:, None], PATCH)[:, 0]
        for name, scores in (("hottest", patches), ("random", torch.rand_like(patches))):
            found = classifier.logits(torch.where(quarter(scores, size), black, images)).argmax(dim=-1)
            print(f"without the {name} quarter: another class for {(found != predicted).float().mean():.0%}")


if __name__ == "__main__":
    main(sys.argv[1])
