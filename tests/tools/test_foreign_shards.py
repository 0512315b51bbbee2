"""Shards that other programs made are indexed where they lie: CLIP_benchmark's folders, timm's ImageNet."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clipcluster.data.shards import Shards, open_folder, open_source
from clipcluster.errors import UserError
from tools.index import index_folders


def _source(shards: str) -> Any:
    return SimpleNamespace(shards=shards, index=None, captions_in=None)


def _by_key(shards: Shards) -> dict[str, Any]:
    return {sample.key: sample for sample in map(shards.read, range(shards.n_samples))}


def test_clip_benchmarks_classification(clip_benchmark: Any, picture: Callable, tmp_path: Path) -> None:
    root = clip_benchmark.classification(tmp_path / "wds_pets")
    done = index_folders([root / "train", root / "test"])
    assert [(summary.shards, summary.samples, summary.captions) for summary in done] == [(11, 24, 0)] * 2
    shards = open_folder(root / "train")
    assert shards.classnames == list(clip_benchmark.classnames)
    assert shards.templates == list(clip_benchmark.templates)
    found = _by_key(shards)
    for number in range(24):
        sample = found[f"s{number:07d}"]
        assert (sample.image, sample.cls) == (picture(number, "WEBP"), number % 3)
    with pytest.raises(UserError, match="the shards lie in its folders test, train; give one of them"):
        index_folders([root])


def test_clip_benchmarks_retrieval_counts_every_line(clip_benchmark: Any, tmp_path: Path) -> None:
    root = clip_benchmark.retrieval(tmp_path / "wds_flickr")
    (done,) = index_folders([root / "test"])
    assert (done.captions_choice, done.samples) == ("lines", 12)
    assert done.captions == sum(len(clip_benchmark.captions(number)) for number in range(12))
    found = _by_key(open_source(_source(str(root / "test")), text=True))
    for number in range(12):
        assert found[f"s{number:07d}"].captions == clip_benchmark.captions(number)


def test_timms_imagenet_is_one_folder_of_two_splits(
    timm_imagenet: Callable, picture: Callable, tmp_path: Path
) -> None:
    folder = timm_imagenet(tmp_path / "imagenet")
    (done,) = index_folders([folder])
    assert (done.shards, done.samples) == (3, 14)
    train = open_source(_source(f"{folder}/imagenet1k-train-{{0000..0001}}.tar"), text=False)
    assert train.sample_counts.tolist() == [5, 5]
    for number in range(10):
        sample = train.read(number, text=False)
        assert (sample.key, sample.cls) == (f"n{number % 3:08d}_{number}", number % 3)
        assert sample.image == picture(number)
    validation = open_source(_source(f"{folder}/imagenet1k-validation-*.tar"), text=False)
    assert [validation.read(number, text=False).cls for number in range(4)] == [0, 1, 2, 0]
    assert np.unique([validation.read(n, text=False).shard for n in range(4)]).tolist() == [
        "imagenet1k-validation-0000.tar"
    ]
