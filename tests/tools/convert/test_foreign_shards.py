"""CLIP_benchmark's folders and timm's ImageNet: indexed where they lie, and converted."""

import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.open import open_folder, open_source
from clipcluster.errors import UserError
from tools.convert.convert import convert
from tools.convert.readers.webdataset import KIND, Options
from tools.convert.records import BadRecord, Record
from tools.shards.index import index_folders


def _source(shards: str) -> Any:
    return SimpleNamespace(shards=shards, index=None, captions_in=None)


def _by_key(shards: Dataset) -> dict[str, Any]:
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
    assert [summary.folder for summary in index_folders([root])] == [root / "train", root / "test"]


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


def _convert(*inputs: Path, **options: Any) -> Any:
    return KIND.open(list(inputs), Options(**options))


def test_all_splits_of_clip_benchmark_are_converted_at_once(clip_benchmark: Any, tmp_path: Path) -> None:
    root = clip_benchmark.classification(tmp_path / "wds_pets")
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "jobs.cli",
        "shards",
        "convert",
        "webdataset",
        str(root),
        "--out",
        str(out),
    ]
    command += ["--template", "a photo of a {c}.", "--template", "{c}"]
    subprocess.run(command, check=True)
    for split in ("train", "test"):
        shards = open_folder(out / split)
        assert (shards.n_samples, len(shards)) == (24, 1)
        assert shards.classnames == list(clip_benchmark.classnames)
        assert shards.templates == list(clip_benchmark.templates)
        for sample in map(shards.read, range(24)):
            name = clip_benchmark.classnames[sample.cls]
            assert sample.captions == [f"a photo of a {name}.", name]


def test_retrieval_keeps_all_captions_of_an_image(clip_benchmark: Any, tmp_path: Path) -> None:
    source = _convert(clip_benchmark.retrieval(tmp_path / "wds_flickr"))
    (split,) = source.splits
    assert split.name == "test"
    assert [split.read(number).captions for number in range(12)] == [
        clip_benchmark.captions(number) for number in range(12)
    ]


def test_timms_list_names_the_splits(timm_imagenet: Callable, picture: Callable, tmp_path: Path) -> None:
    folder = timm_imagenet(tmp_path / "imagenet")
    (tmp_path / "names").write_text("tench\ngoldfish\nshark\n")
    source = _convert(folder, classnames=tmp_path / "names", template=("the {c}",), class_field="label")
    assert [(split.name, len(split)) for split in source.splits] == [("train", 10), ("validation", 4)]
    train = source.splits[0]
    records = [train.read(number) for number in range(10)]
    assert [record.image for record in sorted(records, key=_number)] == [
        picture(number) for number in range(10)
    ]
    assert [record.cls for record in sorted(records, key=_number)] == [number % 3 for number in range(10)]
    assert {record.cls: record.captions for record in records} == {
        0: ["the tench"],
        1: ["the goldfish"],
        2: ["the shark"],
    }
    assert source.inputs[-1].path == str(tmp_path / "names")
    with pytest.raises(BadRecord, match="no class in its json: alt is None"):
        _convert(folder, class_field="alt").splits[0].read(0)
    (tmp_path / "names").write_text("tench\n")
    for template in (("{c}",), ()):
        with pytest.raises(BadRecord, match="class 2, and there are 1 names of classes"):
            _convert(folder, classnames=tmp_path / "names", template=template).splits[0].read(9)
    (folder / "imagenet1k-train-0001.tar").unlink()
    with pytest.raises(UserError, match=r"imagenet1k-train-0001.tar is not there, and .*_info.json lists it"):
        _convert(folder)


def test_the_index_has_the_size_of_the_image_that_was_written(picture: Callable, tmp_path: Path) -> None:
    images = {"s.jpg": picture(1, "PNG"), "s.png": picture(2, "PNG") + bytes(1000)}  # one name by content
    tars = tmp_path / "in"
    tars.mkdir()
    with tarfile.open(tars / "0.tar", "w") as tar:
        for name, data in images.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    convert("webdataset", tmp_path / "out", [tars])
    assert open_folder(tmp_path / "out").read(0).image == images["s.png"]


def _number(record: Record) -> int:
    return int(record.key.rpartition("_")[2])


def test_what_holds_no_tars_or_names_is_said(timm_imagenet: Callable, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = timm_imagenet(tmp_path / "imagenet")
    for inputs, options, words in (
        ([tmp_path / "nowhere"], {}, "no such folder"),
        ([tmp_path / "empty"], {}, "no .tar in this folder, nor in the folders below it"),
        ([folder], {"template": ("{c}",)}, "no classnames.txt in .* give --classnames FILE"),
        ([folder], {"template": ("no name",)}, "a template is one line with {c}"),
        ([folder], {"classnames": tmp_path / "none"}, "no such file; give the names of the classes"),
        ([folder, folder / "imagenet1k-train-0000.tar"], {}, "convert them one by one"),
    ):
        with pytest.raises(UserError, match=words):
            _convert(*inputs, **options)
