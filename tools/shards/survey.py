"""What the samples of a shard are: kinds and sizes by content, captions, classes, keys, what is bad.

One pass over a shard for `shards stats` and `shards verify`.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipcluster.data.images.format import kind_of, no_image, size_of
from clipcluster.data.shards.dataset import Dataset


@dataclass
class Survey:
    """The facts about the n samples of a shard, in their order.

    `sizes` (n, 2) int64: width and height in pixels by the header, 0 where it says none; `usable` (n,) bool;
    `image_bytes` (n,) int64; `content` (n, 16) uint8: half of the image bytes' sha256; `classes` (n,) int32,
    -1 where there is none; `lengths` int32: characters of every caption. With `details` off only `kinds`,
    `bad` and `usable` are filled.
    """

    shard: str
    kinds: Counter[str]
    bad: list[dict[str, Any]]
    usable: np.ndarray
    sizes: np.ndarray
    image_bytes: np.ndarray
    content: np.ndarray
    classes: np.ndarray
    lengths: np.ndarray
    keys: list[str]


def survey(
    shards: Dataset,
    shard: int,
    lost: Mapping[int, str],
    at: Callable[[int], None],
    *,
    decoded: bool,
    details: bool,
) -> Survey:
    """Reads every sample of a shard; decodes its image if `decoded`. A task of `tools.shards.pool`.

    What cannot be decoded, or is no known kind of image, stands in `bad` with its reason.
    """
    fault_of = _decoding() if decoded else _by_kind
    kinds: Counter[str] = Counter()
    bad = []
    count = int(shards.sample_counts[shard])
    first = int(shards.sample_counts[:shard].sum())
    usable, sizes, weights, content, classes, lengths, keys = [], [], [], [], [], [], []
    for position in range(first, first + count):
        sample = shards.read(position, text=details)
        at(position)
        kind = kind_of(sample.image)
        reason = lost[position] if position in lost else fault_of(sample.image)
        if kind is not None:
            kinds[kind] += 1
        if reason is not None:
            bad.append({"shard": sample.shard, "key": sample.key, "reason": reason})
        usable.append(reason is None)
        if details:
            keys.append(sample.key)
            sizes.append((position not in lost and size_of(sample.image)) or (0, 0))
            weights.append(len(sample.image))
            content.append(hashlib.sha256(sample.image).digest()[:16])
            classes.append(sample.cls)
            lengths += [len(text) for text in sample.captions]
    at(-1)
    return Survey(
        shard=shards.shard_name(shard),
        kinds=kinds,
        bad=bad,
        usable=np.array(usable, bool),
        sizes=np.array(sizes, np.int64).reshape(-1, 2),
        image_bytes=np.array(weights, np.int64),
        content=np.frombuffer(b"".join(content), np.uint8).reshape(-1, 16),
        classes=np.array(classes, np.int32),
        lengths=np.array(lengths, np.int32),
        keys=keys,
    )


def _by_kind(image: bytes) -> str | None:
    """Why bytes are no image at all; None for every known kind, whole or not."""
    return no_image(image) if kind_of(image) is None else None


def _decoding() -> Callable[[bytes], str | None]:
    """Tells why an image cannot be decoded, None if it can. Loads torch."""
    import torch

    from clipcluster.data.images.decode import BadImage, decode

    torch.set_num_threads(1)

    def fault_of(image: bytes) -> str | None:
        try:
            decode(image)
        except BadImage as error:
            return str(error)
        return None

    return fault_of
