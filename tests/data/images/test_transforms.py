"""Crops that are a function of a seed, and the evaluation's square."""

import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval
from torchvision.transforms import v2

from clipcluster.data.images.decode import decode
from clipcluster.data.images.transforms import crop_box, draw_seed, evaluation_transform, train_transform
from clipcluster.recipe.sections.image import Image as ImageSection

IMAGE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 60), dtype=np.uint8))


def _section(**keys: object) -> ImageSection:
    return ImageSection.model_validate({"size": 16, "crop_scale": (0.5, 1.0), **keys})


def test_the_seed_decides_and_nothing_else() -> None:
    transform = train_transform(_section(flip=True))
    torch.manual_seed(1)
    first = [transform(IMAGE, seed) for seed in range(20)]
    state = torch.get_rng_state()
    again = [transform(IMAGE, seed) for seed in range(20)]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({image.numpy().tobytes() for image in first}) == 20
    assert first[0].shape == (3, 16, 16)
    assert first[0].dtype == torch.uint8


def test_seeds_are_stable_over_versions() -> None:
    assert draw_seed(0, 1, 2, 3, -1) == 3557841211797800834
    assert draw_seed(1, 0) != draw_seed(0, 1)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.floats(0.2, 1),
    st.integers(0),
)
def test_boxes_lie_inside(height: int, width: int, a: float, b: float, ratio: float, seed: int) -> None:
    scale = (min(a, b), max(a, b))
    top, left, h, w = crop_box(height, width, scale, (ratio, 1 / ratio), random.Random(seed))
    assert h >= 1
    assert w >= 1
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w


def test_boxes_are_distributed_as_torchvisions() -> None:
    scale, ratio = (0.3, 0.9), (0.75, 4 / 3)
    torch.manual_seed(0)
    theirs = np.array(
        [v2.RandomResizedCrop.make_params(_crop(scale, ratio), [IMAGE]) for _ in range(4000)], object
    )
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs], float)
    ours = np.array([crop_box(40, 60, scale, ratio, random.Random(seed)) for seed in range(4000)], float)
    for quantile in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(np.quantile(ours, quantile, 0), np.quantile(theirs, quantile, 0), atol=1.6)
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.5)


def _crop(scale: tuple[float, float], ratio: tuple[float, float]) -> v2.RandomResizedCrop:
    return v2.RandomResizedCrop(16, scale, ratio, antialias=True)


def test_pixels_are_close_to_pillows() -> None:
    """Decoder, crop and bicubic resize against the path of PIL and torchvision that OpenCLIP takes."""
    numbers = np.random.default_rng(0)
    transform = train_transform(_section(size=224, crop_scale=(0.9, 1.0)))
    for number in range(6):
        coarse = Image.fromarray(numbers.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
        grain = numbers.normal(0, 10, (375, 500, 1))
        file = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(
            file, "JPEG", quality=90
        )
        ours = transform(decode(file.getvalue()), number).permute(1, 2, 0).numpy().astype(int)
        top, left, height, width = crop_box(375, 500, (0.9, 1.0), (0.75, 4 / 3), random.Random(number))
        bicubic = v2.InterpolationMode.BICUBIC
        theirs = v2.functional.resized_crop(Image.open(file), top, left, height, width, [224, 224], bicubic)
        difference = np.abs(ours - np.asarray(theirs).astype(int))
        assert difference.mean() < 0.1  # of 255 levels
        assert difference.max() <= 2


def test_half_are_mirrored_if_asked() -> None:
    plain, mirrored = train_transform(_section()), train_transform(_section(flip=True))
    flipped = 0
    for seed in range(200):
        a, b = plain(IMAGE, seed), mirrored(IMAGE, seed)
        assert torch.equal(a, b) or torch.equal(a, b.flip(2))
        flipped += not torch.equal(a, b)
    assert 70 < flipped < 130


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (8, 8), (1, 30), (16, 16)])
def test_evaluation_resizes_the_shortest_side_and_cuts_the_centre(size: tuple[int, int]) -> None:
    image = IMAGE[:, : size[0], : size[1]] if size != (60, 40) else IMAGE.transpose(1, 2)
    out = evaluation_transform(_section())(image)
    assert out.shape == (3, 16, 16)
    reference = v2.Compose([v2.Resize(16, v2.InterpolationMode.BICUBIC), v2.CenterCrop(16)])
    pillow = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    assert np.array_equal(out.permute(1, 2, 0).numpy(), np.asarray(reference(pillow)))


@pytest.mark.parametrize(
    "rule", [("shortest", 0.875, "center"), ("squash", 1.0, "squash"), ("squash", 0.9, "squash")]
)
@pytest.mark.parametrize("size", [(40, 60), (60, 41), (30, 30)])
def test_evaluation_resizes_as_timm(size: tuple[int, int], rule: tuple[str, float, str]) -> None:
    """ConvNeXt's rules, and Chinese-CLIP's."""
    resize, crop_pct, mode = rule
    image = torch.nn.functional.interpolate(IMAGE[None].float(), size=size, mode="bilinear")[0].byte()
    section = _section(size=28, evaluation={"resize": resize, "crop_pct": crop_pct})
    theirs = transforms_imagenet_eval(
        28, crop_pct=crop_pct, crop_mode=mode, interpolation="bicubic", normalize=False
    )
    expected = theirs(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
    found = evaluation_transform(section)(image)
    assert torch.equal(found, expected)


def test_the_middle_of_a_strip_is_all_that_is_resized() -> None:
    """Resized whole, these 300 kB become 15 GB."""
    transform = evaluation_transform(_section(size=224))
    strip = torch.zeros(3, 1, 100_000, dtype=torch.uint8)
    strip[:, :, 50_000:] = 200
    found = transform(strip)
    assert found.shape == (3, 224, 224)
    assert found[:, :, :100].max() < 100 < found[:, :, 124:].min()
    assert torch.equal(transform(strip.transpose(1, 2)), found.transpose(1, 2))
