"""The preparation of samples with stored augmentations, teachers' embeddings and synthetic captions.

The layout is DataCompDR's: `image_emb` (augmentations, width), a row for each entry of `param_aug`;
`text_emb` (captions, width), the image's own captions first. The synthetic captions are the lists `syn_text…`
of `KEY.syn.json`; the rows of a list are `LIST_emb`, or the last of `text_emb` where there is no such array.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clipcluster.data.images.transforms import TrainTransform
from clipcluster.data.loading.extras import BadExtra
from clipcluster.data.loading.preparation import Drawn, Preparation, Row
from clipcluster.data.shards import captions
from clipcluster.data.shards.dataset import Sample
from clipcluster.data.tokenizer import Tokenizer
from clipcluster.recipe.captions import OWN, field_of

if TYPE_CHECKING:
    from clipcluster.recipe.sections.distill import Stored

ARRAYS, AUGMENTATIONS, SYNTHETIC, RECORD = "npz|pth.gz", "paug.json", "syn.json", "json"
"""The members of a sample, by the names that the table of tasks gives them."""
IMAGE, TEXT, SYNTHETIC_TEXT = "image_emb", "text_emb", "synthetic_emb"
"""The extras of a batch: the teachers' embeddings (b, width) float32 of image, caption, synthetic caption."""
TOKENS, MASK = "synthetic_tokens", "synthetic_mask"
"""The synthetic caption's tokens (b, L) int64 and mask (b, L) bool."""


class StoredPreparation(Preparation):
    """One of the stored augmentations, and the embeddings that belong to it and to the caption drawn.

    With `stored.captions: both` also one of the synthetic captions: each list as likely as any other, and so
    each caption of a list.
    """

    turned = False  # crops and original sizes are those of the pixels as stored, as the teachers saw them

    def __init__(self, transform: TrainTransform, tokenizer: Tokenizer, stored: Stored) -> None:
        super().__init__(transform)
        self.tokenizer, self.both, self.width = tokenizer, stored.captions == "both", sum(stored.widths)

    def check(self, sample: Sample, pixels: Tensor, values: Mapping[str, Any]) -> None:
        arrays = values[ARRAYS]
        missing = {IMAGE, TEXT} - arrays.keys()
        if missing:
            raise BadExtra(f"no array {' and '.join(sorted(missing))}")
        for name, array in arrays.items():
            if name.endswith("_emb") and (array.ndim != 2 or array.shape[1] != self.width):
                raise BadExtra(f"{name} has the shape {tuple(array.shape)}, not (…, {self.width})")
            if name.endswith("_emb") and not array.isfinite().all():
                raise BadExtra(f"{name} holds values that are not finite")
        images, augmentations = len(arrays[IMAGE]), len(values[AUGMENTATIONS])
        if images != augmentations:
            raise BadExtra(f"{images} rows of {IMAGE} for {augmentations} augmentations")
        size, original = (pixels.shape[1], pixels.shape[2]), _original_size(values[RECORD])
        for own in values[AUGMENTATIONS]:
            if not own.fits(size, original):
                sides = "unknown" if original is None else f"{original[1]} x {original[0]}"
                raise BadExtra(
                    f"the crop {list(own.crop)} (top, left, height, width) is not inside the image of "
                    f"{size[1]} x {size[0]} pixels; original_width and original_height of its JSON: {sides}"
                )
        lists = _synthetic(values)
        if self.both and not lists:
            raise BadExtra("no synthetic caption in syn.json")
        places = [*sample.origins, *((f"syn.json:{name}", n) for name in lists for n, _ in lists[name])]
        for choice, number in places:
            array, row = _place(values, choice, number)
            if not 0 <= row < len(arrays.get(array, ())):
                raise BadExtra(f"no embedding for text {number} of {choice}")

    def __call__(self, drawn: Drawn) -> Row:
        numbers = random.Random(drawn.seed)
        values, arrays = drawn.values, drawn.values[ARRAYS]
        chosen = _one_of(len(values[AUGMENTATIONS]), numbers)
        image = values[AUGMENTATIONS][chosen].apply(
            drawn.pixels, self.transform.size, _original_size(values[RECORD])
        )
        assert drawn.caption is not None, "distillation needs captions"
        extras = {
            IMAGE: arrays[IMAGE][chosen].float(),
            TEXT: _embedding(values, *drawn.sample.origins[drawn.caption]),
        }
        if self.both:
            lists = _synthetic(values)
            name = sorted(lists)[_one_of(len(lists), numbers)]
            number, text = lists[name][_one_of(len(lists[name]), numbers)]
            tokens, mask = self.tokenizer([text])
            extras |= {SYNTHETIC_TEXT: _embedding(values, f"syn.json:{name}", number)}
            extras |= {TOKENS: tokens[0], MASK: mask[0]}
        return Row(image, self.text(drawn), extras)


def _one_of(count: int, numbers: random.Random) -> int:
    """A random number below `count`, by the method that is stable across versions of Python."""
    return int(numbers.random() * count)


def _synthetic(values: Mapping[str, Any]) -> dict[str, list[tuple[int, str]]]:
    """The lists of synthetic captions that have any: name -> captions, each with its number in the list."""
    written = values[SYNTHETIC]
    lists = {
        name: captions.numbered(captions.JSON, written, f"json:{name}")
        for name in written
        if name.startswith("syn_text") and isinstance(written[name], list)
    }
    return {name: found for name, found in lists.items() if found}


def _place(values: Mapping[str, Any], choice: str, number: int) -> tuple[str, int]:
    """The array and the row of it that belong to text `number` of a caption choice; row -1: there is none."""
    arrays, written = values[ARRAYS], values[SYNTHETIC]
    lists = [name for name in written if name.startswith("syn_text") and isinstance(written[name], list)]
    inside = [name for name in lists if f"{name}_emb" not in arrays]
    own = len(arrays[TEXT]) - sum(len(written[name]) for name in inside)  # rows of the image's own captions
    field = field_of(choice)
    if field is None or field in OWN:
        return TEXT, number if number < own else -1
    if field[0] != SYNTHETIC:  # texts that the teachers did not see
        return TEXT, -1
    if field[1] not in inside:
        return f"{field[1]}_emb", number
    return TEXT, own + number if own > 0 and len(inside) == 1 else -1


def _embedding(values: Mapping[str, Any], choice: str, number: int) -> Tensor:
    name, row = _place(values, choice, number)
    return values[ARRAYS][name][row].float()


def _original_size(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the image before it was resized for its shard, where the JSON has them."""
    height, width = (record.get(f"original_{side}") for side in ("height", "width"))
    height, width = (
        side if isinstance(side, int | float) and 1 <= side < 1e9 else 0 for side in (height, width)
    )
    return (int(height), int(width)) if height and width else None
