"""Shards as webdataset hands them out: the samples that training reads, each once, wherever they lie."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from torch.utils.data import DataLoader

import clipcluster
from clipcluster.data.images.decode import BadImage, decode
from clipcluster.data.shards.open import open_folder
from clipcluster.errors import UserError
from clipcluster.runtime.outcome import DataError

Known = dict[str, tuple[list[str], int, torch.Tensor]]


@pytest.fixture(scope="module")
def folder(make_shards: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("stream") / "train", 20, per_shard=3)


@pytest.fixture(scope="module")
def bare(folder: Path) -> Path:
    """The same shards without their index."""
    copy = folder.parent / "bare"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.idx", "index.*"))
    return copy


def read(folder: Path) -> Known:
    """Captions, class and pixels of every sample by its key, as our own dataset gives them."""
    shards = open_folder(folder)
    samples = [shards.read(position) for position in range(shards.n_samples)]
    return {sample.key: (sample.captions, sample.cls, decode(sample.image)) for sample in samples}


def same(stream: Iterable[dict[str, Any]], known: Known) -> bool:
    """Whether a stream has exactly these samples, each once."""
    samples = list(stream)
    assert [sample["__key__"] for sample in samples] == [*known]
    for sample in samples:
        captions, cls, pixels = known[sample["__key__"]]
        assert (sample["captions"], sample["cls"]) == (captions, cls)
        assert torch.equal(sample["image"], pixels)
    return True


def test_every_way_to_name_shards_gives_the_samples_of_training(
    folder: Path, bare: Path, tmp_path: Path, web_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = read(folder)
    assert len(known) == 20
    server = web_server(folder.parent)
    monkeypatch.setenv("CLIPCLUSTER_CACHE", str(tmp_path / "cache"))
    for place in (folder, bare):
        remote = f"{server.address}/{place.name}"
        for shards in (
            place,
            f"{place}/*.tar",
            f"{place}/{{00000..00006}}.tar",
            [place / f"0000{number}.tar" for number in range(7)],
            f"{remote}/{{00000..00006}}.tar",
            f"pipe:cat {place}/{{00000..00006}}.tar",
        ):
            if str(shards).startswith("pipe:") and place == folder:
                continue  # a command cannot list an index
            stream = clipcluster.webdataset(shards)
            assert isinstance(stream, wds.WebDataset)
            assert same(stream, known), shards
    assert same(clipcluster.webdataset(f"{server.address}/train"), known)
    assert same(clipcluster.webdataset(bare, index=folder), known)
    fetched = [path for method, path, _, _ in server.log if method == "GET" and path.endswith(".tar")]
    assert Counter(fetched) == {f"/{place.name}/0000{n}.tar": 1 for place in (folder, bare) for n in range(7)}
    two = clipcluster.webdataset([f"{folder}/00000.tar", f"{bare}/00001.tar"])
    assert [sample["__url__"] for sample in two] == [f"{folder}/00000.tar"] * 3 + [f"{bare}/00001.tar"] * 3


@pytest.mark.parametrize("place", ["train", pytest.param("bare", marks=pytest.mark.long)])
def test_ranks_and_workers_share_the_samples(
    folder: Path, bare: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, known, found = clipcluster.webdataset(folder.parent / place), read(folder), []
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        for sample in DataLoader(stream, batch_size=None, num_workers=2):
            captions, cls, pixels = known[sample["__key__"]]
            assert (sample["captions"], sample["cls"]) == (captions, cls)
            assert torch.equal(sample["image"], pixels)
            found.append(sample["__key__"])
    assert sorted(found) == sorted(known)
    again = pickle.loads(pickle.dumps(stream))  # as to a process that does not inherit it
    monkeypatch.delenv("WORLD_SIZE")
    assert same(again, known)


def test_webdatasets_own_arguments_and_methods_hold(folder: Path, bare: Path) -> None:
    known = read(folder)
    shuffled = clipcluster.webdataset(folder, shardshuffle=100, seed=3)
    keys = [sample["__key__"] for sample in shuffled]
    assert sorted(keys) == [*known]
    assert keys != [*known]
    endless = clipcluster.webdataset(bare, resampled=True)
    drawn = Counter(sample["__key__"] for sample in itertools.islice(endless, 200))
    assert len(list(DataLoader(endless.with_epoch(25), batch_size=None, num_workers=2))) == 50
    assert drawn.keys() <= known.keys()
    assert drawn.most_common(1)[0][1] > 1
    stream = clipcluster.webdataset(folder, members=["json", "npz"])
    numbers = [json.loads(sample["json"])["id"] for sample in stream]
    assert numbers == list(range(20))
    assert all("npz" not in sample for sample in stream)
    batches = list(
        clipcluster.webdataset(folder)
        .map_dict(image=lambda pixels: pixels.float() / 255)
        .to_tuple("image", "cls")
        .batched(8)
    )
    assert [tuple(images.shape) for images, _ in batches] == [(8, 3, 10, 12), (8, 3, 10, 12), (4, 3, 10, 12)]
    assert [cls for _, classes in batches for cls in classes] == [number % 4 for number in range(20)]
    with pytest.raises(TypeError, match="cache_dir: no effect here"):
        clipcluster.webdataset(folder, cache_dir="/tmp")


def test_captions_by_choice(folder: Path, bare: Path) -> None:
    for place in (folder, bare):
        stream = clipcluster.webdataset(place, captions_in="txt") if place == bare else None
        if stream is None:
            with pytest.raises(UserError, match="txt"):
                clipcluster.webdataset(place, captions_in="txt")
            continue
        assert [sample["captions"] for sample in stream] == [[f"caption 0 of {n}"] for n in range(20)]
    (bare / "dataset_type.txt").write_text("retrieval")
    try:
        assert same(clipcluster.webdataset(bare), read(folder))
    finally:
        (bare / "dataset_type.txt").unlink()


def test_what_is_damaged_goes_to_the_handler(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "bad", 6, per_shard=3, bad={1})
    with pytest.raises(BadImage, match=r"bad/00000\.tar, key s00001: HTML or XML"):
        list(clipcluster.webdataset(folder))
    skipping = clipcluster.webdataset(folder, handler=wds.ignore_and_continue)
    assert [sample["__key__"] for sample in skipping] == ["s00000", *(f"s0000{n}" for n in range(2, 6))]
    stopping = clipcluster.webdataset(folder, handler=wds.ignore_and_stop)
    assert [sample["__key__"] for sample in stopping] == ["s00000"]
    stream = clipcluster.webdataset(folder, handler=wds.ignore_and_continue)
    tar = folder / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:-1500])
    assert [sample["__key__"] for sample in stream] == ["s00003", "s00004", "s00005"]  # it changed
    with pytest.raises(DataError, match=r"00000\.tar changed since it was indexed"):
        list(clipcluster.webdataset(folder))
    for file in folder.glob("*.idx"):
        file.unlink()
    (folder / "index.bin").unlink()
    with pytest.raises(DataError, match=r"00000\.tar is broken: "):
        list(clipcluster.webdataset(f"{folder}/00000.tar", handler=only_bad_images))
    cut = clipcluster.webdataset(f"{folder}/00000.tar", handler=wds.ignore_and_continue)
    assert [sample["__key__"] for sample in cut] == ["s00000"], "s00001 is damaged, s00002 may lack captions"
    packed = folder / "packed.tar"
    packed.write_bytes(gzip.compress((folder / "00001.tar").read_bytes()))
    both = f"{folder}/{{packed,00001}}.tar"
    with pytest.raises(DataError, match=rf"^{packed} is compressed with gzip"):
        list(clipcluster.webdataset(both))
    others = clipcluster.webdataset(both, handler=wds.ignore_and_continue)
    assert [sample["__key__"] for sample in others] == ["s00003", "s00004", "s00005"]
    with pytest.raises(UserError, match="no such folder"):
        clipcluster.webdataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"9\.tar does not exist"):
        clipcluster.webdataset(folder / "9.tar")
    with pytest.raises(UserError, match="there are no shards"):
        clipcluster.webdataset([])
    empty = clipcluster.webdataset(f"{folder}/00001.tar", nodesplitter=lambda shards: iter(()))
    with pytest.raises(ValueError, match="No samples found"):
        list(empty)


def only_bad_images(error: Exception) -> bool:
    if not isinstance(error, BadImage):
        raise error
    return True
