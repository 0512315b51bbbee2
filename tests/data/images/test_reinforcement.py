"""Stored augmentations: compared with torchvision's own on the same Pillow images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms import functional as pil
from torchvision.transforms.autoaugment import _apply_op

from clipcluster.data.images.reinforcement import OPERATIONS, StoredAugmentation
from tests.reinforced_shards import MAGNITUDES, picture

SIZE = 32
PIXELS = picture(5, 90, 130)
IMAGE = torch.from_numpy(PIXELS).permute(2, 0, 1)


def by_hand(pixels: np.ndarray, crop: tuple[int, ...], operations: list[tuple[str, float]]) -> torch.Tensor:
    """What the generator of the stored embeddings did to a Pillow image."""
    image = Image.fromarray(pixels)
    image = pil.resized_crop(image, *crop, [SIZE, SIZE], InterpolationMode.BICUBIC)
    for name, magnitude in operations:
        image = _apply_op(image, name, magnitude, InterpolationMode.NEAREST, None)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_the_operations_are_torchvisions_with_their_magnitudes() -> None:
    space = RandAugment()._augmentation_space(31, (224, 224))
    assert list(OPERATIONS) == list(space)
    for (magnitudes, _), magnitude in zip(space.values(), MAGNITUDES, strict=True):
        assert float(magnitudes[9] if magnitudes.ndim else magnitudes) == pytest.approx(magnitude, abs=1e-3)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_applied_as_written(name: str) -> None:
    number = list(OPERATIONS).index(name)
    for sign in (1, -1) if 1 <= number <= 9 else (1,):
        magnitude = sign * MAGNITUDES[number]
        found = StoredAugmentation.of([[10, 20, 60, 90], [[number, magnitude], [0, 0]]]).apply(IMAGE, SIZE)
        expected = by_hand(PIXELS, (10, 20, 60, 90), [(name, magnitude)])
        assert torch.equal(found, expected)
        if name != "Identity":
            assert not torch.equal(found, by_hand(PIXELS, (10, 20, 60, 90), []))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(0, 90), min_size=2, max_size=2, unique=True).map(sorted),
    columns=st.lists(st.integers(0, 130), min_size=2, max_size=2, unique=True).map(sorted),
    first=st.integers(0, 13),
    second=st.integers(0, 13),
)
def test_crop_and_two_operations_in_their_order(
    rows: list[int], columns: list[int], first: int, second: int
) -> None:
    crop = (rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0])
    names = list(OPERATIONS)
    entry = StoredAugmentation.of([crop, [[number, MAGNITUDES[number]] for number in (first, second)]])
    assert entry.fits((90, 130), None)
    operations = [(names[number], MAGNITUDES[number]) for number in (first, second)]
    assert torch.equal(entry.apply(IMAGE, SIZE), by_hand(PIXELS, crop, operations))


def test_the_crop_of_a_shrunk_image_is_shrunk_alike() -> None:
    entry = StoredAugmentation.of([[20, 41, 100, 120], None])
    assert torch.equal(entry.apply(IMAGE, SIZE, (180, 260)), by_hand(PIXELS, (10, 20, 50, 60), []))
    assert torch.equal(entry.apply(IMAGE, SIZE, (90, 130)), by_hand(PIXELS, (20, 41, 100, 120), []))
    assert torch.equal(entry.apply(IMAGE, SIZE, (45, 65)), entry.apply(IMAGE, SIZE))  # never enlarged
    assert StoredAugmentation.of([[0, 0, 1, 1]]).apply(IMAGE, SIZE, (900, 1300)).shape == (3, SIZE, SIZE)


@pytest.mark.parametrize(
    "entry",
    [
        [],
        [[1, 2, 3]],
        [[1, 2, 0, 4], []],
        [[1, 2, 3, 4], [[14, 0.0]]],
        [[1, 2, 3, 4], [["a", 0.0]]],
        [[1, 2, 3, 4], [[3, float("nan")]]],
        [[1, 2, 3, 4], [[3, float("inf")]]],
        [[1, 2, 3, 4], [[10, 9.0]]],
        [[0, 0, float("inf"), 4], []],
        7,
        [None],
    ],
)
def test_what_is_no_augmentation_is_refused(entry: object) -> None:
    with pytest.raises(ValueError, match="no augmentation"):
        StoredAugmentation.of(entry)  # type: ignore[arg-type]
