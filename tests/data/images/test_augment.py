"""Augmentation equals timm's and torchvision's for the same draws, and is a function of its seed alone."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing as TimmErasing
from timm.data.transforms_factory import create_transform
from torchvision.transforms import v2

from clipcluster.data.images.augment import ColorJitter, RandAugment, RandomErasing, seeded
from clipcluster.data.images.transforms import train_transform
from clipcluster.recipe.sections.image import Image as ImageSection

SIDE = 48
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_COARSE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8))
PICTURE = _COARSE.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
IMAGE = torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
@pytest.mark.parametrize("notation", ["rand-m9-mstd0.5-inc1", "rand-m15-n3-p0.7-mstd101-mmax20", "rand-t3aw"])
def test_rand_augment_is_timms(notation: str, interpolation: str) -> None:
    """Beside the transform that timm's own factory makes, with its generators seeded alike."""
    made = create_transform(
        SIDE,
        is_training=True,
        auto_augment=notation,
        interpolation=interpolation,
        mean=MEAN,
        std=STD,
        separate=True,
    )
    theirs = made[1].transforms[0]
    section = ImageSection(size=SIDE, mean=MEAN, std=STD, augment=notation, interpolation=interpolation)
    (ours,) = train_transform(section).changes
    changed = 0
    for seed in range(40):
        found = ours(IMAGE, random.Random(seed))
        with seeded(random.Random(seed).getrandbits(64)):
            expected = np.array(theirs(PICTURE))
        np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)
        changed += not torch.equal(found, IMAGE)
    assert changed > 15


def test_the_largest_magnitude_posterizes_to_black() -> None:
    """timm keeps no bits there, which newer Pillows refuse with an error and older ones made black."""
    change = RandAugment("rand-m10-n1-p1.0-inc1", SIDE, MEAN, None)
    found = [change(IMAGE, random.Random(seed)) for seed in range(60)]
    assert 1 <= sum(not image.any() for image in found) <= 12


def test_process_wide_generators_are_left_as_they_were() -> None:
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(3)
    RandAugment("rand-m9-mstd0.5", SIDE, MEAN, None)(IMAGE, random.Random(0))
    assert (random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("count", [1, 3])
def test_erased_boxes_are_timms(count: int) -> None:
    theirs = TimmErasing(0.6, mode="const", max_count=count, device="cpu")
    ours = RandomErasing(0.6, "const", count, MEAN, STD)
    erased = 0
    for seed in range(100):
        ones = torch.ones(3, SIDE, 40)
        with seeded(seed):
            theirs(ones)
        found = torch.ones(3, SIDE, 40)
        for top, left, height, width in ours.boxes(SIDE, 40, _as_seeded(seed)):
            found[:, top : top + height, left : left + width] = 0
        assert torch.equal(found, ones)
        erased += bool((ones == 0).any())
    assert 45 < erased < 75


def _as_seeded(seed: int) -> random.Random:
    """A generator in the state that `seeded` puts Python's into."""
    return random.Random(seed)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erased_pixels_are_timms_within_what_a_byte_holds(mode: str) -> None:
    """timm erases the normalised image: const is 0 there, rand one deviate a channel, pixel one a pixel."""
    ours = RandomErasing(1.0, mode, 1, MEAN, STD)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    values = []
    for seed in range(60):
        found = ours(IMAGE, random.Random(seed))
        ((top, left, height, width),) = ours.boxes(SIDE, SIDE, random.Random(seed))
        box = (slice(None), slice(top, top + height), slice(left, left + width))
        outside = found.clone()
        outside[box] = IMAGE[box]
        assert torch.equal(outside, IMAGE)
        patch = (found.float() / 255 - mean) / std
        values.append(patch[box])
        if mode != "pixel":
            assert all(len(channel.unique()) == 1 for channel in found[box])
    deviates = torch.cat([value.flatten(1)[:, : None if mode == "pixel" else 1] for value in values], dim=1)
    if mode == "const":
        assert deviates.abs().max() <= 0.5 / 255 / min(STD) + 1e-6
        return
    # normal deviates, bounded to black and white: the middle of the distribution is timm's
    quantiles = torch.quantile(deviates, torch.tensor([0.2, 0.5, 0.8]), dim=1).mean(dim=1)
    tolerance = 0.02 if mode == "pixel" else 0.25
    torch.testing.assert_close(quantiles, torch.tensor([-0.8416, 0.0, 0.8416]), atol=tolerance, rtol=0)


def test_color_jitter_makes_torchvisions_changes() -> None:
    """The same factors in the same order through torchvision's changes of PIL images, as timm makes them."""
    ours = ColorJitter(0.4, 0.3, 0.2, 0.0)  # Pillow's hue has 256 steps
    for seed in range(20):
        numbers = random.Random(seed)
        order = list(range(4))
        numbers.shuffle(order)
        strengths, picture = (0.4, 0.3, 0.2), PICTURE
        names = ("brightness", "contrast", "saturation")
        for which in (which for which in order if which < 3):
            factor = numbers.uniform(1 - strengths[which], 1 + strengths[which])
            picture = getattr(v2.functional, f"adjust_{names[which]}")(picture, factor)
        difference = np.abs(
            np.array(picture).astype(int) - ours(IMAGE, random.Random(seed)).permute(1, 2, 0).numpy()
        )
        assert difference.mean() < 0.7  # of 255 levels
        assert difference.max() <= 3


def test_the_seed_decides_all_of_it_and_it_travels_to_workers() -> None:
    section = ImageSection.model_validate(
        {
            "size": 24,
            "augment": "rand-m9-mstd0.5-inc1",
            "color_jitter": [0.4, 0.4, 0.4, 0.1],
            "random_erasing": {"probability": 0.8, "count": 2},
            "interpolation": "random",
            "flip": True,
        }
    )
    transform = train_transform(section)
    assert transform.modules == ("timm.data.auto_augment",)
    torch.manual_seed(1)
    first = [transform(IMAGE, seed) for seed in range(20)]
    states = torch.get_rng_state(), random.getstate()
    copied = pickle.loads(pickle.dumps(transform))
    again = [copied(IMAGE, seed) for seed in reversed(range(20))]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert all(image.shape == (3, 24, 24) and image.dtype == torch.uint8 for image in first)
    assert len({image.numpy().tobytes() for image in first}) == 20


def test_without_it_the_crops_are_what_they_were() -> None:
    plain = train_transform(ImageSection(size=24, flip=True))
    jittered = train_transform(ImageSection(size=24, flip=True, color_jitter=(0, 0, 0, 0)))
    assert all(torch.equal(plain(IMAGE, seed), jittered(IMAGE, seed)) for seed in range(10))
