"""What `clipcluster bench loader` measures: the loader, decoding without it, OpenCLIP's and timm's loaders.

A program, with its settings as JSON: it prints what it is once it is ready, then for each line of its input
works for so many seconds and prints what it did, so that the time to start is in no figure. With OpenCLIP's
loader it runs in an interpreter without clipcluster.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

CROP_SCALE = (0.9, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CONTEXT_LENGTH = 77
# Of the augmented contenders, which flip too; mmax9: timm fails at full magnitude with newer Pillows.
AUGMENT, ERASING = "rand-m9-mstd0.5-mmax9-inc1", 0.25
FILES = 256  # decoded again and again where there is no loader
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Part = tuple[Callable[[], int], dict[str, Any]]  # loads some images and returns how many; what it is


def loader(settings: dict[str, Any]) -> Part:
    """The loader as training uses it, with the byte tokenizer; augmented without captions, for classes."""
    from clipcluster.data.loading.batch import normalise
    from clipcluster.data.loading.loader import Loader
    from clipcluster.data.sampling.sampler import sampler_of
    from clipcluster.data.shards.open import open_source
    from clipcluster.data.tokenizer import load_tokenizer
    from clipcluster.recipe.sections.data import Data
    from clipcluster.recipe.sections.recipe import Recipe

    augmented = settings["part"] == "augmented"
    erasing = {"probability": ERASING, "mode": "pixel"}
    more = {"augment": AUGMENT, "flip": True, "random_erasing": erasing} if augmented else {}
    data = Data.model_validate(
        {
            "train": [{"shards": settings["shards"], "index": settings["index"]}],
            "batch_size": settings["batch_size"],
            "workers": settings["workers"],
            "image": {"size": settings["size"], "crop_scale": CROP_SCALE, "crop_ratio": CROP_RATIO, **more},
            "text": {"tokenizer": "bytes", "context_length": CONTEXT_LENGTH, "captions": "random"},
        }
    )
    shards = [open_source(data.train[0], text=not augmented)]
    batches = Loader(
        shards,
        sampler_of(Recipe.model_construct(data=data, seed=0), shards),
        data,
        tokenizer=None if augmented else load_tokenizer(data.text),
        seed=0,
        workers=settings["workers"],
    )

    def take() -> int:
        batch = next(batches)
        if settings["normalise"]:
            normalise(batch.images, MEAN, STD)
        return len(batch)

    return take, {}


def decoding(settings: dict[str, Any]) -> Part:
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

    return take, {}


def timm_loader(settings: dict[str, Any]) -> Part:
    """timm's loader of a folder of image files, with its own transform: uint8 batches for its prefetcher.

    The prefetcher, which normalises and erases on the device, is left out: this is the workers' part.
    """
    import timm
    import torch
    from timm.data import ImageDataset, create_loader

    from clipcluster.data.shards.open import open_folder

    shards = open_folder(settings["shards"], settings["index"])
    files = Path(settings["scratch"]) / "images"
    files.mkdir()
    for position in range(0, shards.n_samples, max(1, shards.n_samples // FILES))[:FILES]:
        (files / f"{position}.jpg").write_bytes(shards.read(position, text=False).image)
    dataset = ImageDataset(settings["scratch"])
    dataset.reader.samples *= max(1, 100 * settings["batch_size"] // FILES)  # so that epochs end rarely
    loader = create_loader(
        dataset,
        (3, settings["size"], settings["size"]),
        settings["batch_size"],
        is_training=True,
        re_prob=ERASING,
        re_mode="pixel",
        scale=CROP_SCALE,
        ratio=CROP_RATIO,
        hflip=0.5,
        auto_augment=AUGMENT,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        num_workers=settings["workers"],
        device=torch.device("cpu"),
    )

    def batches() -> Iterator[Any]:
        while True:
            yield from loader.loader

    endless = batches()
    return lambda: len(next(endless)[0]), {"timm": timm.__version__}


def open_clip(settings: dict[str, Any]) -> Part:
    """OpenCLIP's get_wds_dataset as `open_clip_train --dataset-resampled` builds it.

    With its train transform and our crop, and the same byte tokenizer: both do the same work.
    """
    import multiprocessing
    from types import SimpleNamespace

    import open_clip
    import torch
    import webdataset
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    def tokenizer(text: str) -> torch.Tensor:
        """(1, L) int64: begin, the bytes, end, padding, as clipcluster's ByteTokenizer."""
        row = [256, *text.encode("utf-8", "replace")[: CONTEXT_LENGTH - 2], 257]
        return torch.tensor([row + [258] * (CONTEXT_LENGTH - len(row))])

    # its pipeline holds functions that cannot be pickled
    multiprocessing.set_start_method("fork", force=True)
    arguments = SimpleNamespace(
        train_data=sorted(map(str, Path(settings["shards"]).glob("*.tar"))),
        train_num_samples=10**9,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        seed=0,
        batch_size=settings["batch_size"],
        workers=settings["workers"],
        world_size=1,
    )
    transform = image_transform(
        settings["size"], is_train=True, interpolation="bicubic", aug_cfg={"scale": CROP_SCALE}
    )
    batches = iter(get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer).dataloader)
    versions = {"open_clip": open_clip.__version__, "webdataset": webdataset.__version__}
    return lambda: len(next(batches)[0]), versions


PARTS = {
    "loader": loader,
    "augmented": loader,
    "decode": decoding,
    "resize": decoding,
    "timm": timm_loader,
    "open_clip": open_clip,
}


def main() -> None:
    """Runs the part named in the settings until standard input ends.

    The first calls of a repetition are not timed: their images were loaded while others were measured.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    settings = json.loads(sys.argv[1])
    take, about = PARTS[settings["part"]](settings)
    answers.write(json.dumps(about) + "\n")
    for line in sys.stdin:
        before = sum(take() for _ in range(2 * settings["workers"] + 2))
        begin, images = time.perf_counter(), 0
        while time.perf_counter() - begin < float(line):
            images += take()
        elapsed = time.perf_counter() - begin
        answers.write(json.dumps({"images": images, "seconds": elapsed, "untimed": before}) + "\n")


if __name__ == "__main__":
    main()
