"""Augmentation of a training image after its crop: RandAugment, color jitter, random erasing.

Each is called with an image, (3, S, S) uint8, and the draw's generator, from which all random numbers come,
and returns an image. The operations are timm's and torchvision's; where these draw from process-wide
generators, those are seeded for the call and restored, which is exact as long as no other thread of the
process draws from them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

_TRIES = 10  # as timm's RandomErasing
_AREA = (0.02, 1 / 3)
_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
_TRANSLATION = 0.45  # of the image's side, as timm's transforms_factory


class Augmentation(Protocol):
    """One random change of an image; `modules` are its heavy imports, which the fork server makes once."""

    modules: ClassVar[tuple[str, ...]]

    def __call__(self, image: Tensor, numbers: random.Random) -> Tensor:
        """(3, S, S) uint8 -> (3, S, S) uint8."""


@dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment (Cubuk et al. 2020) by its notation, as timm's training transform builds it.

    notation: such as `rand-m9-mstd0.5-inc1`. size: side of the image in pixels. mean: the fill colour, in
    0..1. interpolation: of translations, shears and rotations; None: bilinear or bicubic, drawn.
    """

    notation: str
    size: int
    mean: tuple[float, float, float]
    interpolation: InterpolationMode | None

    modules: ClassVar[tuple[str, ...]] = ("timm.data.auto_augment",)

    def __call__(self, image: Tensor, numbers: random.Random) -> Tensor:
        change = _rand_augment(self.notation, self.size, self.mean, self.interpolation)
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        with seeded(numbers.getrandbits(64)):
            picture = change(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@cache
def _rand_augment(
    notation: str, size: int, mean: Sequence[float], interpolation: InterpolationMode | None
) -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import posterize, rand_augment_transform
    from timm.data.transforms import str_to_pil_interp

    settings: dict[str, Any] = {
        "translate_const": int(size * _TRANSLATION),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
    }
    if interpolation is not None:
        settings["interpolation"] = str_to_pil_interp(interpolation.value)
    change: Any = rand_augment_transform(notation, settings)
    for operation in change.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return cast(Callable[[Image.Image], Image.Image], change)


def _posterize(picture: Image.Image, bits: int, **others: Any) -> Image.Image:
    """timm's, which keeps 0 bits at full magnitude: black, as in versions of Pillow that accepted 0 bits."""
    from timm.data.auto_augment import posterize

    if bits == 0:
        return Image.new(picture.mode, picture.size)
    posterized: Image.Image = posterize(picture, bits, **others)
    return posterized


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the process-wide generators of Python and NumPy are seeded with 64 bits; then restored."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue changed in random order, by torchvision's rule.

    Factors are uniform from max(0, 1 - strength) to 1 + strength; the hue's shift is uniform from -hue to
    hue, in turns of the colour circle.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float

    modules: ClassVar[tuple[str, ...]] = ()

    def __call__(self, image: Tensor, numbers: random.Random) -> Tensor:
        changes: list[tuple[Callable[[Tensor, float], Tensor], float, float]] = [
            (F.adjust_brightness, self.brightness, 1.0),
            (F.adjust_contrast, self.contrast, 1.0),
            (F.adjust_saturation, self.saturation, 1.0),
            (F.adjust_hue, self.hue, 0.0),
        ]
        numbers.shuffle(changes)
        for change, strength, middle in changes:
            if strength:
                least = max(0.0, middle - strength) if middle else -strength
                image = change(image, numbers.uniform(least, middle + strength))
        return image


@dataclass(frozen=True)
class RandomErasing:
    """Up to `count` rectangles of the image erased, by timm's rule (Zhong et al. 2017, "Random Erasing").

    probability: of erasing at all. The rectangles have 2% to 33% of the area, divided by their number, and an
    aspect ratio from 0.3 to 1 / 0.3. mode: they become `const` (the mean colour), `rand` (one random colour
    each), or `pixel` (random pixels). timm fills normalised images with normal deviates; here the deviates
    are converted to pixels by `mean` and `std`, rounded, and clipped to 0..255.
    """

    probability: float
    mode: str
    count: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    modules: ClassVar[tuple[str, ...]] = ()

    def __call__(self, image: Tensor, numbers: random.Random) -> Tensor:
        boxes = self.boxes(image.shape[1], image.shape[2], numbers)
        if not boxes:
            return image
        image = image.clone()
        noise = np.random.default_rng(numbers.getrandbits(64))
        for top, left, height, width in boxes:
            shape = (3, height, width) if self.mode == "pixel" else (3, 1, 1)
            deviates = np.zeros(shape) if self.mode == "const" else noise.standard_normal(shape)
            mean, std = (np.array(values)[:, None, None] for values in (self.mean, self.std))
            pixels = np.rint(255 * (mean + std * deviates)).clip(0, 255).astype(np.uint8)
            image[:, top : top + height, left : left + width] = torch.from_numpy(pixels)
        return image

    def boxes(self, height: int, width: int, numbers: random.Random) -> list[tuple[int, int, int, int]]:
        """Top, left, height, width (pixels) of the rectangles; random numbers are drawn in timm's order."""
        if numbers.random() > self.probability:
            return []
        found = []
        count = self.count if self.count == 1 else numbers.randint(1, self.count)
        for _ in range(count):
            for _ in range(_TRIES):
                area = numbers.uniform(*_AREA) * height * width / count
                aspect = math.exp(numbers.uniform(*_LOG_ASPECT))
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if h < height and w < width:
                    top = numbers.randint(0, height - h)
                    found.append((top, numbers.randint(0, width - w), h, w))
                    break
        return found
