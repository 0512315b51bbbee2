"""What `clipcluster bench loader` measures of this project: the loader, and decoding without a loader.

Run as a program with its settings as JSON; see `tools.bench.process.serve`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import cycle
from typing import Any

from tools.bench.process import serve

CROP_SCALE = (0.9, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
FILES = 256  # decoded again and again where there is no loader


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def loader(settings: dict[str, Any]) -> Callable[[], int]:
    """The loader as training uses it, with the byte tokenizer."""
    from clipcluster.data.loading.batch import normalise
    from clipcluster.data.loading.loader import Loader
    from clipcluster.data.sampling.sampler import sampler_of
    from clipcluster.data.shards.open import open_source
    from clipcluster.data.tokenizer import load_tokenizer
    from clipcluster.recipe.sections.data import Data
    from clipcluster.recipe.sections.recipe import Recipe

    data = Data.model_validate(
        {
            "train": [{"shards": settings["shards"], "index": settings["index"]}],
            "batch_size": settings["batch_size"],
            "workers": settings["workers"],
            "image": {"size": settings["size"], "crop_scale": CROP_SCALE, "crop_ratio": CROP_RATIO},
            "text": {
                "tokenizer": "bytes",
                "context_length": settings["context_length"],
                "captions": "random",
            },
        }
    )
    shards = [open_source(data.train[0], text=True)]
    batches = Loader(
        shards,
        sampler_of(Recipe.model_construct(data=data, seed=0), shards),
        data,
        tokenizer=load_tokenizer(data.text),
        seed=0,
        workers=settings["workers"],
    )

    def take() -> int:
        batch = next(batches)
        if settings["normalise"]:
            normalise(batch.images, MEAN, STD)
        return len(batch)

    return take


def decoding(settings: dict[str, Any]) -> Callable[[], int]:
    """Decoding alone, or with the crop and its resize, of files in memory: one thread, no text."""
    import torch
    from torchvision.transforms.v2 import InterpolationMode

    from clipcluster.data.images.decode import BadImage, decode
    from clipcluster.data.images.transforms import TrainTransform
    from clipcluster.data.shards.open import open_folder

    torch.set_num_threads(1)
    shards = open_folder(settings["shards"], settings["index"])
    positions = range(0, shards.n_samples, max(1, shards.n_samples // FILES))[:FILES]
    files = enumerate(cycle([shards.read(position, text=False).image for position in positions]))
    transform = TrainTransform(settings["size"], CROP_SCALE, CROP_RATIO, False, InterpolationMode.BICUBIC)

    def take() -> int:
        number, data = next(files)
        try:
            pixels = decode(data)
        except BadImage:
            return 0
        if settings["part"] == "resize":
            transform(pixels, number)
        return 1

    return take


def main() -> None:
    """The part named in the settings."""
    settings = json.loads(sys.argv[1])
    if settings["part"] == "loader":
        serve({}, loader(settings), lead=settings["lead"])
    else:
        serve({}, decoding(settings))


if __name__ == "__main__":
    main()
