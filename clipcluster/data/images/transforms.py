"""From decoded pixels to the tower's input size. uint8 in, uint8 out: normalising happens on the device.

The random crop is a pure function of a seed, drawn here: torchvision's transform would take its numbers from
the process-wide generator, whose state would then have to be saved.
"""

import hashlib
import math
import random
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

_TRIES = 10  # as torchvision's RandomResizedCrop


def draw_seed(*numbers: int) -> int:
    """A stable 64-bit hash of signed 64-bit integers."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class TrainTransform:
    """A random crop of a fraction of the area, resized to a square; mirrored by chance if `flip`."""

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    interpolation: InterpolationMode

    def __call__(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        """(3, H, W) uint8 to (3, size, size) uint8; the same seed gives the same crop."""
        numbers = random.Random(seed)
        top, left, height, width = crop_box(image.shape[1], image.shape[2], self.scale, self.ratio, numbers)
        out = F.resized_crop(
            image, top, left, height, width, [self.size, self.size], self.interpolation, antialias=True
        )
        if self.flip and numbers.random() < 0.5:
            out = F.horizontal_flip(out)
        return out.contiguous()


@dataclass(frozen=True)
class EvaluationTransform:
    """The shortest side to `size`, then the centre square."""

    size: int
    interpolation: InterpolationMode

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """(3, H, W) uint8 to (3, size, size) uint8."""
        out = F.resize(image, [self.size], self.interpolation, antialias=True)
        return F.center_crop(out, [self.size, self.size]).contiguous()


def train_transform(image: Any) -> TrainTransform:
    """The training transform of a recipe's `data.image` section."""
    scale, ratio = tuple(image.crop_scale), tuple(image.crop_ratio)
    return TrainTransform(image.size, scale, ratio, image.flip, InterpolationMode(image.interpolation))


def evaluation_transform(image: Any) -> EvaluationTransform:
    """The evaluation transform of a recipe's `data.image` section."""
    return EvaluationTransform(image.size, InterpolationMode(image.interpolation))


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], numbers: random.Random
) -> tuple[int, int, int, int]:
    """Top, left, height and width (pixels) of a random crop, by the rule of torchvision's RandomResizedCrop.

    Fraction of the area uniform in `scale`, log of width over height uniform in `ratio`, ten tries, then the
    largest centre crop that keeps the ratio's bounds (Szegedy et al. 2015, "Going deeper with convolutions").
    """
    for _ in range(_TRIES):
        area = height * width * numbers.uniform(*scale)
        aspect = math.exp(numbers.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(numbers.random() * (height - h + 1)), int(numbers.random() * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w
