"""Preparation: from a drawn sample to its row of the batch: image, caption and extras.

A task may have a preparation of its own, where its images are not cropped at random, or where it needs more
than one caption or only a part of a member.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clipcluster.data.images.transforms import TrainTransform
from clipcluster.data.shards.dataset import Sample
from clipcluster.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Drawn:
    """A good sample as drawn for one slot of a batch.

    pixels: (3, H, W) uint8. values: its further members, decoded, by name. caption: index in
    `sample.captions`, None where it has none. seed: a hash of (seed, source, pass, sample, caption), the only
    source of random numbers that a preparation may use.
    """

    sample: Sample
    pixels: Tensor
    values: Mapping[str, Any]
    caption: int | None
    seed: int


@dataclass(frozen=True)
class Row:
    """A sample's row of the batch: image (3, S, S) uint8, the text to tokenize, and extras by name."""

    image: Tensor
    text: str
    extras: Mapping[str, Any] = field(default_factory=dict)


class Preparation:
    """The default preparation: a random crop of the image, the caption drawn, and all members unchanged.

    turned: whether images are turned by their EXIF orientation.
    """

    turned = True

    def __init__(self, transform: TrainTransform) -> None:
        self.transform = transform

    @property
    def modules(self) -> tuple[str, ...]:
        """Heavy imports, which the fork server makes once for all workers."""
        return self.transform.modules

    def check(self, sample: Sample, pixels: Tensor, values: Mapping[str, Any]) -> None:
        """BadExtra where a sample's members do not fit each other, or its pixels (3, H, W).

        It must not depend on the draw: a sample is bad in all draws or in none.
        """

    def __call__(self, drawn: Drawn) -> Row:
        """The row of a drawn sample that passed `check`: a pure function of `drawn`."""
        return Row(self.transform(drawn.pixels, drawn.seed), self.text(drawn), drawn.values)

    def text(self, drawn: Drawn) -> str:
        """The caption drawn; empty where there is none."""
        return "" if drawn.caption is None else drawn.sample.captions[drawn.caption]


class Retokenized(Preparation):
    """The default preparation, and the caption's tokens by further tokenizers.

    tokenizers: names of tokens and mask in the batch's extras, (b, L) int64 and (b, L) bool -> tokenizer.
    """

    def __init__(self, transform: TrainTransform, tokenizers: Mapping[tuple[str, str], Tokenizer]) -> None:
        super().__init__(transform)
        self.tokenizers = tokenizers

    @property
    def modules(self) -> tuple[str, ...]:
        own = (getattr(tokenizer, "modules", ()) for tokenizer in self.tokenizers.values())
        return (*super().modules, *(module for modules in own for module in modules))

    def __call__(self, drawn: Drawn) -> Row:
        row, extras = super().__call__(drawn), {}
        for names, tokenizer in self.tokenizers.items():
            made = zip(names, tokenizer([row.text]), strict=True)
            extras.update({name: values[0] for name, values in made})
        return Row(row.image, row.text, {**row.extras, **extras})
