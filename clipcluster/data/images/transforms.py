"""From decoded pixels to the tower's input size, uint8 to uint8; normalisation takes place on the device.

All random numbers are a pure function of a seed: torchvision's own transforms would draw from the
process-wide generator, whose state would then have to be saved.
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

from clipcluster.data.images.augment import Augmentation, ColorJitter, RandAugment, RandomErasing

_TRIES = 10  # as torchvision's RandomResizedCrop
_LONGEST = 64  # times the shorter side: longer images are cropped to this before evaluation resizes them
_DRAWN = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)  # as timm's `random`


def draw_seed(*numbers: int) -> int:
    """A stable 64-bit hash of signed 64-bit integers."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class TrainTransform:
    """A random crop, resized to a square, flipped with probability 0.5 if `flip`, then changed by `changes`.

    size: side of the square in pixels. scale, ratio: as in `crop_box`. interpolation: of the resizing; None:
    bilinear or bicubic, drawn.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    interpolation: InterpolationMode | None
    changes: tuple[Augmentation, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Heavy imports, which the fork server makes once for all of the loader's workers."""
        return tuple(module for change in self.changes for module in change.modules)

    def __call__(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        """(3, H, W) uint8 to (3, size, size) uint8; the same seed gives the same pixels."""
        numbers = random.Random(seed)
        top, left, height, width = crop_box(image.shape[1], image.shape[2], self.scale, self.ratio, numbers)
        interpolation = self.interpolation or numbers.choice(_DRAWN)
        out = F.resized_crop(
            image, top, left, height, width, [self.size, self.size], interpolation, antialias=True
        )
        if self.flip and numbers.random() < 0.5:
            out = F.horizontal_flip(out)
        for change in self.changes:
            out = change(out, numbers)
        return out.contiguous()


@dataclass(frozen=True)
class EvaluationTransform:
    """The shortest side (squash: both) to floor(size / crop_pct), then the centre square of `size`.

    Pillow resizes, as for the figures that others publish (OpenCLIP, CLIP_benchmark, timm): torch's resizing
    of uint8 has coarser weights, and differs by a level or two.
    """

    size: int
    interpolation: InterpolationMode
    squash: bool = False
    crop_pct: float = 1.0

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """(3, H, W) uint8 to (3, size, size) uint8."""
        side = math.floor(self.size / self.crop_pct)
        if not self.squash:  # a strip would become very long, and only its middle is used
            longest = _LONGEST * min(image.shape[1:])
            image = F.center_crop(image, [min(longest, length) for length in image.shape[1:]])
        picture = F.to_pil_image(image)
        picture = F.resize(picture, [side, side] if self.squash else [side], self.interpolation)
        return F.pil_to_tensor(F.center_crop(picture, [self.size, self.size])).contiguous()


def train_transform(image: Any) -> TrainTransform:
    """The training transform of a recipe's `data.image` section."""
    scale, ratio = tuple(image.crop_scale), tuple(image.crop_ratio)
    interpolation = None if image.interpolation == "random" else InterpolationMode(image.interpolation)
    changes: list[Augmentation] = []
    if image.augment:
        changes.append(RandAugment(image.augment, image.size, tuple(image.mean), interpolation))
    if image.color_jitter:
        changes.append(ColorJitter(*image.color_jitter))
    erasing = image.random_erasing
    if erasing:
        mean, std = tuple(image.mean), tuple(image.std)
        changes.append(RandomErasing(erasing.probability, erasing.mode, erasing.count, mean, std))
    return TrainTransform(image.size, scale, ratio, image.flip, interpolation, tuple(changes))


def evaluation_transform(image: Any) -> EvaluationTransform:
    """The evaluation transform of a recipe's `data.image` section; bicubic where training draws it."""
    name = "bicubic" if image.interpolation == "random" else image.interpolation
    rule = image.evaluation
    return EvaluationTransform(
        image.size, InterpolationMode(name), squash=rule.resize == "squash", crop_pct=rule.crop_pct
    )


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], numbers: random.Random
) -> tuple[int, int, int, int]:
    """Top, left, height and width (pixels) of a random crop, by the rule of torchvision's RandomResizedCrop.

    The fraction of the area is uniform in `scale`, the logarithm of width / height uniform between those of
    `ratio`; after ten tries that do not fit, the largest centre crop within `ratio` (Szegedy et al. 2015,
    "Going deeper with convolutions", section 6).
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
