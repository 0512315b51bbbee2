"""OpenCLIP's own loader, measured beside this project's; runs with an interpreter without clipcluster.

Its get_wds_dataset as `open_clip_train --dataset-resampled` builds it, its train transform with our crop, and
the same byte tokenizer, so that both do the same work on the text.
"""

import json
import multiprocessing
import os
import sys
import time
from types import SimpleNamespace


def byte_tokens(context_length):
    """tokenizer(text) -> (1, L) int64: begin, the bytes, end, padding, as clipcluster's ByteTokenizer."""
    import torch

    def tokenizer(text):
        row = [256, *text.encode("utf-8", "replace")[: context_length - 2], 257]
        return torch.tensor([row + [258] * (context_length - len(row))])

    return tokenizer


def main():
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    import open_clip
    import webdataset
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    multiprocessing.set_start_method(
        "fork", force=True
    )  # its pipeline holds functions that cannot be pickled
    arguments = SimpleNamespace(
        train_data=settings["tars"],
        train_num_samples=10**9,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        seed=0,
        batch_size=settings["batch_size"],
        workers=settings["workers"],
        world_size=1,
    )
    transform = image_transform(
        settings["size"],
        is_train=True,
        interpolation="bicubic",
        aug_cfg={"scale": settings["crop_scale"]},
    )
    batches = iter(
        get_wds_dataset(
            arguments, transform, is_train=True, tokenizer=byte_tokens(settings["context_length"])
        ).dataloader
    )
    versions = {"open_clip": open_clip.__version__, "webdataset": webdataset.__version__}
    answers.write(json.dumps(versions) + "\n")
    for line in sys.stdin:
        seconds = json.loads(line)["seconds"]
        before = sum(len(next(batches)[0]) for _ in range(settings["lead"]))
        begin, images = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            images += len(next(batches)[0])
        elapsed = time.perf_counter() - begin
        answers.write(json.dumps({"images": images, "seconds": elapsed, "untimed": before}) + "\n")


if __name__ == "__main__":
    main()
