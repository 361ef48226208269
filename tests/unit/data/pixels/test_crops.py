"""Parts of images that views show: torchvision's, drawn from the same numbers."""

import pytest
import torch
from torchvision.transforms import v2

from lora_dist.data.pixels.crops import draw_crop

SIZES = [(512, 384), (384, 512), (32, 32), (1, 1), (1, 2), (7, 4), (4, 7), (2000, 3), (3, 2000)]
"""Of the last two the middle is taken: they are so long that no part of them has a shape that may be."""


@pytest.mark.parametrize("smallest", [0.08, 0.5, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_the_parts_are_those_of_torchvision_and_so_are_the_numbers_after_them(
    size: tuple[int, int], smallest: float
) -> None:
    _assert_same_parts(size, smallest, range(100))


def test_the_sides_of_a_part_are_rounded_as_torchvision_rounds_them() -> None:
    """With the first of these seeds, double precision gives a part that is narrower by one and elsewhere."""
    _assert_same_parts((4000, 3000), 0.08, range(1016142, 1016144))


def _assert_same_parts(size: tuple[int, int], smallest: float, seeds: range) -> None:
    torchvision = v2.RandomResizedCrop(224, scale=(smallest, 1.0))
    image = torch.empty(1, size[1], size[0], device="meta")
    for seed in seeds:
        torch.manual_seed(seed)
        left, top, right, bottom = draw_crop(size, smallest)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        theirs = torchvision.make_params([image])
        assert {"left": left, "top": top, "width": right - left, "height": bottom - top} == theirs
        assert torch.equal(torch.get_rng_state(), after)
