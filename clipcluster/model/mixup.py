"""Mixup (Zhang et al. 2017) and cutmix (Yun et al. 2019) of pairs of samples.

Slots 2k and 2k + 1 of the global batch are a pair, whose images and classes are mixed with each other. So the
mixed batch depends on the seed and the number of the batch alone, and not on ranks and micro-batches, none of
which may divide a pair (timm mixes sample i of each rank's batch of n with sample n - 1 - i).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clipcluster.data.images.transforms import draw_seed

if TYPE_CHECKING:
    from clipcluster.recipe.sections.data import Mixup


@dataclass(frozen=True)
class Mix:
    """How a sample is mixed. own: weight of its own class; the other's is 1 - own.

    box: top, bottom, left and right (pixels) of the part that is taken from the other image (cutmix); None:
    all pixels are mixed by their weights (mixup).
    """

    own: float = 1.0
    box: tuple[int, int, int, int] | None = None


class Mixer:
    """Mixes the pairs in a part of a batch. settings: the recipe's `data.mixup`."""

    def __init__(self, settings: Mixup, seed: int) -> None:
        self._settings, self._seed = settings, seed

    def __call__(self, images: Tensor, batch: int, slot: int) -> tuple[Tensor, Tensor]:
        """Mixed images, and the weight of each sample's own class, (b,) float32 on the images' device.

        images: (b, 3, H, W) float, b even. batch: number of the global batch; slot: the first sample's in it,
        even.
        """
        if len(images) % 2 or slot % 2:
            raise ValueError(f"{len(images)} samples from slot {slot} on are not whole pairs")
        mixes = self.mixes(batch, range(slot, slot + len(images)), *images.shape[-2:])
        own = torch.tensor([mix.own for mix in mixes], dtype=torch.float64)
        weights, others = own.float().to(images.device, non_blocking=True), swapped(images)
        if all(mix.box is not None for mix in mixes):
            return torch.where(self._inside(mixes, images), others, images), weights
        shares = torch.stack([own, 1 - own]).to(images).view(2, -1, 1, 1, 1)
        mixed = images * shares[0] + others * shares[1]
        if all(mix.box is None for mix in mixes):
            return mixed, weights
        pasted = torch.where(self._inside(mixes, images), others, images)
        cut = torch.tensor([mix.box is not None for mix in mixes], device=images.device)
        return torch.where(cut.view(-1, 1, 1, 1), pasted, mixed), weights

    def mixes(self, batch: int, slots: Sequence[int], height: int, width: int) -> list[Mix]:
        """How the samples in these slots of a batch are mixed."""
        drawn_for = {"batch": lambda slot: -1, "pair": lambda slot: slot // 2, "elem": lambda slot: slot}
        numbers = [drawn_for[self._settings.mode](slot) for slot in slots]
        draws: dict[int, Mix] = {}
        for number in dict.fromkeys(numbers):
            seed = draw_seed(self._seed, batch, number)
            generator = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32])
            draws[number] = draw(self._settings, generator, height, width)
        return [draws[number] for number in numbers]

    def _inside(self, mixes: Sequence[Mix], images: Tensor) -> Tensor:
        """Which pixels lie in the boxes, (b, 1, H, W) bool."""
        boxes = torch.tensor([mix.box or (0, 0, 0, 0) for mix in mixes]).to(images.device, non_blocking=True)
        rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
        top, bottom, left, right = boxes.view(-1, 4, 1).unbind(1)
        high, wide = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
        return (high.unsqueeze(2) & wide.unsqueeze(1)).unsqueeze(1)


def draw(settings: Mixup, numbers: np.random.RandomState, height: int, width: int) -> Mix:
    """Draw how a sample is mixed; random numbers are used in the order of timm's Mixup (mode batch)."""
    if numbers.rand() >= settings.probability:
        return Mix()
    cutting = settings.cutmix > 0 and (settings.alpha == 0 or numbers.rand() < settings.switch)
    alpha = settings.cutmix if cutting else settings.alpha
    own = float(numbers.beta(alpha, alpha))
    if not cutting or own == 1.0:
        return Mix(own)
    ratio = np.sqrt(1 - own)
    cut_height, cut_width = int(height * ratio), int(width * ratio)
    y, x = numbers.randint(0, height), numbers.randint(0, width)
    top, bottom = np.clip([y - cut_height // 2, y + (cut_height + 1) // 2], 0, height).tolist()
    left, right = np.clip([x - cut_width // 2, x + (cut_width + 1) // 2], 0, width).tolist()
    area = (bottom - top) * (right - left)  # of what lies inside the image
    return Mix(1.0 - area / float(height * width), (top, bottom, left, right))


def swapped(rows: Tensor) -> Tensor:
    """The rows with those of each pair exchanged: (b, …) -> (b, …)."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
