"""Images to model input: the processor's own for evaluation, random views in its format."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_dist_testing.processors import PROCESSORS
from lora_dist_testing.tiny import make_image, view_of
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from transformers import BitImageProcessor, ConvNextImageProcessor

from lora_dist.data.pixels.images import load_rgb, opened
from lora_dist.data.pixels.mixing import draw_mixture
from lora_dist.data.pixels.transforms import ImageTransforms, seed_of, seeded
from lora_dist.data.pixels.views import stack
from lora_dist.errors import UserError
from lora_dist.settings.train import AugmentationSettings

LEVEL = 2 / 255
"""One of 8 bits, as ViT's processor scales them."""
SIZES = {"not square": (24, 40)}


@pytest.fixture(params=PROCESSORS)
def processor_name(request: pytest.FixtureRequest) -> str:
    return request.param


def transforms_of(name: str, **augmentation: Any) -> ImageTransforms:
    return ImageTransforms(PROCESSORS[name](), AugmentationSettings(**augmentation))


@pytest.mark.parametrize("size", [(40, 32), (32, 40), (200, 9), (32, 32), (3, 3)])
def test_evaluation_is_the_processor_and_nothing_else(processor_name: str, size: tuple[int, int]) -> None:
    image = make_image(1, 2, size)
    transforms = transforms_of(processor_name)
    expected = PROCESSORS[processor_name]()([image, image], return_tensors="pt")["pixel_values"]
    assert torch.equal(transforms.batch([image, image]), expected)
    assert (transforms.height, transforms.width) == SIZES.get(processor_name, (32, 32))
    assert expected.shape == (2, 3, transforms.height, transforms.width)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize("policy", ["none", "basic", "randaugment", "trivialaugment"])
def test_a_view_has_the_form_of_an_evaluation_and_depends_on_its_seed_alone(processor_name: str, policy: str) -> None:
    transforms = transforms_of(processor_name, augmentation=policy, random_erasing=0.5)
    image = make_image(0, 0, (60, 50))
    torch.manual_seed(0)
    first = [view_of(transforms, image, (1, 2, row)) for row in range(8)]
    torch.manual_seed(99)
    again = [view_of(transforms, image, (1, 2, row)) for row in reversed(range(8))][::-1]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert {view.shape for view in first} == {transforms.evaluation(image).shape}
    assert {view.dtype for view in first} == {torch.float32}
    assert all(view.isfinite().all() for view in first)
    assert any(not torch.equal(first[0], other) for other in first[1:])


def test_without_augmentation_a_view_is_an_evaluation(processor_name: str) -> None:
    transforms = transforms_of(processor_name, augmentation="none")
    image = make_image(2, 0, (60, 50))
    assert torch.equal(view_of(transforms, image, (1, 2, 3)), transforms.evaluation(image))


@pytest.mark.parametrize("name", ["vit", "mobilevit", "convnext", "resize and crop"])
def test_a_view_of_the_whole_image_keeps_range_and_channel_order(name: str) -> None:
    """A plain image says exactly where each channel goes and how it is scaled."""
    image = Image.new("RGB", (64, 64), (250, 120, 10))
    transforms = transforms_of(name, crop_scale_min=1.0, horizontal_flip=0.0)
    view, expected = view_of(transforms, image, (0, 0, 0)), transforms.evaluation(image)
    assert torch.allclose(view, expected, atol=1e-5)
    assert expected.mean(dim=(1, 2)).unique().numel() == 3, "three different channels, so that their order shows"


def test_a_processor_that_crops_does_not_crop_a_view_again() -> None:
    """ConvNeXt's resizes to size / crop_pct and cuts out the middle; a view has its final size already."""
    processor = ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.5, do_normalize=False)
    transforms = ImageTransforms(processor, AugmentationSettings(crop_scale_min=1.0, horizontal_flip=0.0))
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:4] = 255
    edged = Image.fromarray(pixels)
    assert transforms.evaluation(edged)[:, 0].max() < 0.1
    assert max(float(view_of(transforms, edged, (seed,))[:, 0].mean()) for seed in range(30)) > 0.9


def test_a_crop_that_is_larger_than_the_resize_makes_a_border(processor_name: str) -> None:
    assert not transforms_of(processor_name).has_border()
    padding = BitImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 32, "width": 32}, do_normalize=True)
    assert ImageTransforms(padding, AugmentationSettings()).has_border()


def test_mobilevit_wants_blue_first_in_training_too() -> None:
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    view = view_of(transforms_of("mobilevit", crop_scale_min=1.0, horizontal_flip=0.0), image, (0, 0, 0))
    assert view.mean(dim=(1, 2)).tolist() == pytest.approx([0, 0, 1], abs=1e-5)


def test_the_smallest_share_of_a_crop_is_kept() -> None:
    """A ramp from 0 to 255: what a crop shows of it is the share it keeps of the width."""
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 256).astype(np.uint8)[None, :, None], (256, 1, 3)))
    spans = {}
    for smallest in (0.08, 0.9):
        transforms = transforms_of("vit", crop_scale_min=smallest, horizontal_flip=0.0)
        views = [view_of(transforms, ramp, (0, 0, row)) * 0.5 + 0.5 for row in range(60)]
        spans[smallest] = [float(view.max() - view.min()) for view in views]
    assert min(spans[0.9]) > 0.7
    assert min(spans[0.08]) < 0.5


@pytest.mark.parametrize(("probability", "flipped"), [(0.0, 0), (1.0, 40)])
def test_flips_happen_as_often_as_asked(probability: float, flipped: int) -> None:
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 1, 3)))
    transforms = transforms_of("vit", crop_scale_min=0.5, horizontal_flip=probability)
    views = [view_of(transforms, ramp, (0, 0, row)) for row in range(40)]
    assert sum(bool(view[0, 0, 0] > view[0, 0, -1]) for view in views) == flipped


def test_half_of_the_views_are_flipped_by_default() -> None:
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 1, 3)))
    transforms = transforms_of("vit")
    views = [view_of(transforms, ramp, (0, 0, row)) for row in range(200)]
    assert 70 <= sum(bool(view[0, 0, 0] > view[0, 0, -1]) for view in views) <= 130


@pytest.mark.parametrize(("probability", "erased"), [(0.0, 0), (1.0, 20)])
def test_erasing_blanks_a_rectangle_of_the_normalised_view(probability: float, erased: int) -> None:
    white = Image.new("RGB", (64, 64), (255, 255, 255))
    transforms = transforms_of("vit", random_erasing=probability)
    views = [view_of(transforms, white, (0, 0, row)) for row in range(20)]
    assert sum(bool((view == 0).any()) for view in views) == erased
    for view in views:
        blank = (view == 0).all(dim=0)
        assert bool(((view == 1) | blank).all())
        high, wide = int(blank.any(dim=1).sum()), int(blank.any(dim=0).sum())
        assert int(blank.sum()) == high * wide


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_a_policy_changes_more_than_crop_and_flip(policy: str) -> None:
    image = make_image(0, 1, (50, 50))
    basic = transforms_of("vit", crop_scale_min=1.0, horizontal_flip=0.0)
    more = transforms_of("vit", crop_scale_min=1.0, horizontal_flip=0.0, augmentation=policy)
    changed = [not torch.equal(view_of(basic, image, (row,)), view_of(more, image, (row,))) for row in range(12)]
    assert sum(changed) >= 6


def test_the_random_numbers_of_training_itself_go_on_untouched() -> None:
    """Dropout draws from the same generator in the training process."""
    transforms = transforms_of("vit", augmentation="randaugment", random_erasing=1.0)
    torch.manual_seed(3)
    np.random.seed(3)
    expected, expected_numpy = torch.rand(4), np.random.rand(4)
    torch.manual_seed(3)
    np.random.seed(3)
    view_of(transforms, make_image(0, 0), (1, 2, 3))
    draw_mixture(1.0, 1.0, (8, 8), (1,))
    assert torch.equal(torch.rand(4), expected)
    assert np.array_equal(np.random.rand(4), expected_numpy)


def test_an_error_inside_puts_the_generator_back() -> None:
    def fail() -> None:
        with seeded((1, 2)):
            torch.rand(3)
            raise KeyError

    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_depend_on_every_number_and_on_their_order() -> None:
    numbers = [(a, b, c) for a in range(6) for b in range(6) for c in range(6)]
    assert len({seed_of(each) for each in numbers}) == len(numbers)
    assert seed_of((2**32 - 1, 0, 10**9)) != seed_of((2**32 - 1, 0, 10**9 + 1))


def test_a_processor_that_keeps_each_shape_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"BitImageProcessor.*preprocessor_config\.json"):
        ImageTransforms(BitImageProcessor(size={"shortest_edge": 32}, do_center_crop=False))


def test_the_processors_last_steps_are_those_of_the_processor_to_the_bit(processor_name: str) -> None:
    """What is done for a whole batch on the device, once for every value of a channel, in either layout."""
    transforms = transforms_of(processor_name)
    values = torch.arange(256, dtype=torch.uint8)
    pixels = torch.stack([values, values.flip(0), values.roll(100)]).reshape(1, 3, 16, 16).expand(2, -1, -1, -1)
    expected = PROCESSORS[processor_name]()(pixels, do_resize=False, do_center_crop=False, return_tensors="pt")
    for given in (pixels, pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        found = transforms.finished(given)
        assert torch.equal(found, expected["pixel_values"])
        assert found.is_contiguous()
    assert transforms.finished(found) is found, "what is finished stays as it is"


def test_the_usual_processors_need_not_be_asked_again() -> None:
    assert all(transforms_of(name)._normalisation is not None for name in ("vit", "convnext", "resize and crop"))
    assert transforms_of("mobilevit")._normalisation is None, "it turns the channels round"


def test_of_a_large_jpeg_a_view_is_made_from_fewer_pixels(tmp_path: Path) -> None:
    """And an evaluation from all of them."""
    make_image(1, 1, (512, 400)).resize((1024, 800)).save(tmp_path / "large.jpg", quality=95)
    transforms = transforms_of("vit", crop_scale_min=0.8, horizontal_flip=0.0)
    with opened(str(tmp_path / "large.jpg")) as picture:
        view = transforms.model_input(*stack([transforms.view(picture, (1, 2))]))[0]
        assert picture._image.size == (128, 100)
    whole = load_rgb(str(tmp_path / "large.jpg"))
    assert (view - view_of(transforms, whole, (1, 2))).abs().mean() < 0.05
    expected = PROCESSORS["vit"]()(whole, return_tensors="pt")["pixel_values"]
    assert torch.equal(transforms.finished(transforms.resized([whole])), expected)


@pytest.mark.parametrize("size", [(60, 50), (400, 300), (30, 20)])
def test_a_view_is_that_of_torchvision_to_one_level(size: tuple[int, int]) -> None:
    image = make_image(0, 3, size)
    transforms = transforms_of("vit")
    theirs = v2.Compose([v2.RandomResizedCrop((32, 32)), v2.RandomHorizontalFlip()])
    for number in range(12):
        with seeded((1, number)):
            expected = PROCESSORS["vit"]()(theirs(image), return_tensors="pt")["pixel_values"][0]
        assert (view_of(transforms, image, (1, number)) - expected).abs().max() <= 1.001 * LEVEL


@pytest.mark.parametrize("size", [(60, 50), (400, 300), (30, 20)])
def test_on_the_device_a_view_is_what_it_is_in_a_worker_to_one_level(
    processor_name: str, size: tuple[int, int]
) -> None:
    """Of 255 from black to white: the worker rounds to 8 bits."""
    image = make_image(0, 3, size)
    settings: dict[str, Any] = {"crop_scale_min": 0.5, "random_erasing": 0.5}
    here = transforms_of(processor_name, **settings)
    there = transforms_of(processor_name, augment_on_device=True, **settings)
    black, white = (there.evaluation(Image.new("RGB", (64, 64), color)) for color in ("black", "white"))
    level = float((white - black).max()) / 255
    seeds = [(1, number) for number in range(12)]
    with opened(np.asarray(image)) as picture:
        batch = there.model_input(*stack([there.view(picture, seed) for seed in seeds]))
    for seed, found in zip(seeds, batch, strict=True):
        difference = (found - view_of(here, image, seed)).abs()
        assert difference.max() <= 1.5 * level
        assert difference.mean() < 0.4 * level
        assert torch.allclose(found, view_of(there, image, seed), atol=1e-4), "whatever else is in the batch"


class _Operators(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_constants_are_copied_to_a_device_once() -> None:
    """A copy from pageable memory waits for all work that is queued on a GPU."""
    transforms = ImageTransforms(BitImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False))
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8, device="meta")
    transforms.finished(pixels)
    with _Operators() as called:
        assert transforms.finished(pixels).dtype == torch.float32
    assert called.names == ["aten::empty.memory_format", "aten::copy_", "aten::sub_.Tensor", "aten::div_.Tensor"]
