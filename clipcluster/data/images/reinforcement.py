"""Augmentations that are stored with a sample instead of drawn: a crop, then operations of RandAugment.

They are DataCompDR's, whose stored teacher embeddings are those of the augmented images. As there,
torchvision applies them to a Pillow image; its functions for tensors round differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pil
from torchvision.transforms.v2 import functional as F

_NEAREST = InterpolationMode.NEAREST
Operation = Callable[[Any, float], Any]


def _sheared(image: Any, x: float, y: float) -> Any:
    """The image sheared by these slopes, around the upper left corner."""
    degrees = [math.degrees(math.atan(slope)) for slope in (x, y)]
    return pil.affine(image, 0.0, [0, 0], 1.0, degrees, interpolation=_NEAREST, center=[0, 0])


def _moved(image: Any, x: float, y: float) -> Any:
    """The image translated by whole pixels."""
    return pil.affine(image, 0.0, [int(x), int(y)], 1.0, [0.0, 0.0], interpolation=_NEAREST)


OPERATIONS: dict[str, Operation] = {
    "Identity": lambda image, _: image,
    "ShearX": lambda image, slope: _sheared(image, slope, 0.0),
    "ShearY": lambda image, slope: _sheared(image, 0.0, slope),
    "TranslateX": lambda image, pixels: _moved(image, pixels, 0),
    "TranslateY": lambda image, pixels: _moved(image, 0, pixels),
    "Rotate": lambda image, degrees: pil.rotate(image, degrees, _NEAREST),
    "Brightness": lambda image, change: pil.adjust_brightness(image, 1.0 + change),
    "Color": lambda image, change: pil.adjust_saturation(image, 1.0 + change),
    "Contrast": lambda image, change: pil.adjust_contrast(image, 1.0 + change),
    "Sharpness": lambda image, change: pil.adjust_sharpness(image, 1.0 + change),
    "Posterize": lambda image, bits: pil.posterize(image, int(bits)),
    "Solarize": lambda image, threshold: pil.solarize(image, threshold),
    "AutoContrast": lambda image, _: pil.autocontrast(image),
    "Equalize": lambda image, _: pil.equalize(image),
}
"""RandAugment's operations as torchvision defines them (Cubuk et al. 2020), in the order of their numbers."""
_POSTERIZE = list(OPERATIONS).index("Posterize")


def _applicable(number: int, magnitude: float) -> bool:
    """Whether there is an operation with this number that takes the magnitude without an error."""
    if not 0 <= number < len(OPERATIONS) or not math.isfinite(magnitude):
        return False
    return number != _POSTERIZE or 1 <= magnitude < 9  # bits, of 8


class StoredAugmentation(NamedTuple):
    """A crop (top, left, height, width in pixels of the original image), then operations and magnitudes.

    operations: (number, magnitude); the number is the operation's index in `OPERATIONS`.
    """

    crop: tuple[int, int, int, int]
    operations: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, entry: Sequence[Any]) -> StoredAugmentation:
        """From `[[top, left, height, width], [[operation, magnitude], …]]`. ValueError for anything else."""
        try:
            crop, *rest = entry
            top, left, height, width = (int(value) for value in crop)
            written = rest[0] if rest else None
            operations = tuple((int(number), float(magnitude)) for number, magnitude in written or ())
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"no augmentation: {entry!r}"[:80]) from error
        sized = height >= 1 and width >= 1
        if not sized or not all(_applicable(number, magnitude) for number, magnitude in operations):
            raise ValueError(f"no augmentation: {entry!r}"[:80])
        return cls((top, left, height, width), operations)

    def fits(self, size: tuple[int, int], original: tuple[int, int] | None) -> bool:
        """Whether the crop lies in an image of this size (height, width); `original` as of `apply`."""
        top, left, height, width = _shrunk(self.crop, original, size) if original else self.crop
        return top >= 0 and left >= 0 and top + height <= size[0] and left + width <= size[1]

    def apply(self, image: Tensor, size: int, original: tuple[int, int] | None = None) -> Tensor:
        """(3, H, W) uint8 to (3, size, size) uint8: cropped, resized bicubically, then the operations.

        original: height and width of the image that the crop was drawn from; where this image is smaller, the
        crop is scaled down with it. The crop lies in the image (`fits`).
        """
        box = _shrunk(self.crop, original, (image.shape[1], image.shape[2])) if original else self.crop
        pixels = F.crop(image, *box).permute(1, 2, 0).contiguous()
        found: Any = Image.fromarray(pixels.numpy())
        found = pil.resize(found, [size, size], InterpolationMode.BICUBIC)
        operations = list(OPERATIONS.values())
        for number, magnitude in self.operations:
            found = operations[number](found, magnitude)
        return torch.from_numpy(np.array(found)).permute(2, 0, 1).contiguous()


def _shrunk(
    box: tuple[int, int, int, int], original: tuple[int, int], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """The box scaled from an image of size `original` to one of `size` (height, width); at least a pixel."""
    if size[0] >= original[0] and size[1] >= original[1]:
        return box
    tall, wide = size[0] / original[0], size[1] / original[1]
    top, left = round(box[0] * tall), round(box[1] * wide)
    bottom, right = round((box[0] + box[2]) * tall), round((box[1] + box[3]) * wide)
    return top, left, max(1, bottom - top), max(1, right - left)
