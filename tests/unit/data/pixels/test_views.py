"""Batches of views: what is left to do with them is done as if each had been made by itself, and pairs are mixed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lora_dist.data.pixels.deferred import DeferredOps, combine, resize
from lora_dist.data.pixels.mixing import NOWHERE, Mixture, draw_mixture
from lora_dist.data.pixels.views import View, black, stack

ONES, ZEROS = torch.ones(3, 16, 20), torch.zeros(3, 16, 20)


def combined(views: Sequence[View], *mixing: Any) -> Tensor:
    """The samples of views that are as the model takes them."""
    pixels, rest = stack(views, *mixing)
    return combine(pixels.float(), rest)


def mix_pair(
    first: Tensor, second: Tensor, mixup_alpha: float, cutmix_alpha: float, seed: tuple[int, ...]
) -> tuple[Tensor, float]:
    """The mixed image, and the share of the first in it."""
    mixture = draw_mixture(mixup_alpha, cutmix_alpha, tuple(first.shape[-2:]), seed)
    return combined([View(first), View(second)], [1], [mixture])[0], mixture.lam


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.3), (0.8, 0.5)])
def test_the_share_of_a_label_is_the_share_of_its_image(mixup: float, cutmix: float) -> None:
    shares = []
    for number in range(60):
        mixed, share = mix_pair(ONES, ZEROS, mixup, cutmix, (7, number))
        assert 0 <= share <= 1
        assert mixed.mean().item() == pytest.approx(share, abs=1e-5)
        shares.append(share)
    assert len(set(shares)) > 20
    assert (ONES.min(), ZEROS.max()) == (1, 0), "the images given are left as they are"


def test_mixup_fades_and_cutmix_pastes() -> None:
    pixel_lam = [mix_pair(ONES, ZEROS, 1.0, 0.0, (number,))[0] for number in range(20)]
    assert all(mixed.unique().numel() == 1 for mixed in pixel_lam)
    for number in range(20):
        mixed, _ = mix_pair(ONES, ZEROS, 0.0, 1.0, (number,))
        assert set(mixed.unique().tolist()) <= {0.0, 1.0}
        cut_box = mixed[0] == 0
        assert int(cut_box.sum()) == int(cut_box.any(dim=1).sum()) * int(cut_box.any(dim=0).sum())


def test_with_both_each_is_drawn_about_half_of_the_time() -> None:
    gradient = torch.arange(16 * 20.0).reshape(1, 16, 20).expand(3, -1, -1)
    kept = [
        bool((mix_pair(gradient, -gradient - 1, 1.0, 1.0, (number,))[0] == gradient).any()) for number in range(200)
    ]
    assert 70 <= sum(kept) <= 130


def test_a_pair_is_mixed_by_its_seed_alone() -> None:
    first, second = torch.rand(2, 3, 16, 16)
    one, other = mix_pair(first, second, 0.4, 0.6, (1, 2)), mix_pair(first, second, 0.4, 0.6, (1, 2))
    assert torch.equal(one[0], other[0])
    assert one[1] == other[1] != mix_pair(first, second, 0.4, 0.6, (1, 3))[1]


def test_the_beta_distribution_has_the_asked_concentration() -> None:
    """Var Beta(a, a) = 1 / (4 (2a + 1))."""
    for alpha in (0.2, 2.0):
        shares = [mix_pair(ONES[:, :1, :1], ZEROS[:, :1, :1], alpha, 0.0, (number,))[1] for number in range(800)]
        assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
        assert np.var(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


def noise(count: int, layout: str = "channels first") -> list[Tensor]:
    pixels = torch.from_numpy(np.random.default_rng(count).integers(0, 256, (count, 3, 9, 7)).astype(np.uint8))
    if layout == "channels last":
        pixels = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return list(pixels)


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_pixels_are_stacked_as_they_lie_in_memory(layout: str) -> None:
    images = noise(4, layout)
    pixels, rest = stack([View(image) for image in images])
    assert rest == DeferredOps()
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.stack(images))
    assert pixels.permute(0, 2, 3, 1).is_contiguous() == (layout == "channels last")
    assert torch.equal(combine(pixels.float(), rest), torch.stack(images).float())


def test_what_is_erased_is_zero_to_the_model_whatever_it_was() -> None:
    images, area = noise(3), (2, 1, 4, 3)
    found = combined([View(images[0]), View(images[1], area), View(images[2], (0, 0, 9, 7))])
    expected = torch.stack(images).float()
    expected[1, :, 2:6, 1:4] = 0
    expected[2] = 0
    assert torch.equal(found, expected)


def test_a_partner_that_is_no_sample_itself_comes_after_the_samples() -> None:
    images = noise(3)
    mixtures = [Mixture(0.25, NOWHERE, 0.25), Mixture(1.0, (1, 2, 3, 4), 0.5)]
    found = combined([View(image) for image in images], [2, 0], mixtures)
    first, second, third = (image.float() for image in images)
    cut_box = second.clone()
    cut_box[:, 1:4, 2:6] = first[:, 1:4, 2:6]
    assert torch.allclose(found, torch.stack([0.25 * first + 0.75 * third, cut_box]))


@pytest.mark.parametrize("flipped", [False, True])
def test_a_black_view_is_like_the_others(flipped: bool) -> None:
    like = View(noise(1, "channels last")[0], flipped=flipped)
    blank = black(like, (16, 20))
    assert (blank.pixels.dtype, blank.pixels.stride(), blank.flipped) == (torch.uint8, like.pixels.stride(), flipped)
    pixels, rest = stack([blank])
    assert rest.crop_sizes is not None
    assert not combine(resize(pixels, rest.crop_sizes, (16, 20)) + 5, rest).any()
    assert not combined([black(None, (16, 20))]).any()


def resized(views: Sequence[View], size: tuple[int, int]) -> Tensor:
    pixels, rest = stack(views)
    assert rest.crop_sizes is not None
    return resize(pixels, rest.crop_sizes, size)


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (2, 3), (90, 61)])
def test_parts_of_any_size_are_resized_and_flipped_as_each_by_itself(size: tuple[int, int]) -> None:
    """To one level of 255, since 8-bit interpolation rounds after each direction."""
    random = np.random.default_rng(1)
    sizes = [(32, 32), (61, 90), (90, 61), (5, 7), (1, 1), (64, 20), (33, 200)]
    images = [torch.from_numpy(random.integers(0, 256, (3, *each)).astype(np.uint8)) for each in sizes]
    views = [View(image, flipped=index % 2 == 1) for index, image in enumerate(images)]
    found = resized(views, size)
    assert found.shape == (len(views), 3, *size)
    for view, result in zip(views, found, strict=True):
        expected = interpolate(view.pixels[None], size, mode="bilinear", antialias=True)[0].float()
        difference = (result - (expected.flip(-1) if view.flipped else expected)).abs()
        assert difference.max() <= 1.5
        assert difference.mean() < 0.4
        assert torch.allclose(resized([view], size)[0], result, atol=1e-3), "whatever else is in the batch"
