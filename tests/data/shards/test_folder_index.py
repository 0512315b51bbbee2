"""The index: built from the tars alone, and refused in words where it does not fit."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clipcluster.data.shards.columns import read_columns
from clipcluster.data.shards.folder_index import COLUMNS_FILE
from clipcluster.data.shards.indexing import index_folder, write_entry
from clipcluster.data.shards.open import open_folder
from clipcluster.data.shards.shard_index import sample_name, scan_shard, shard_index_path
from clipcluster.data.shards.shard_list import ENTRIES_FILE, read_summary
from clipcluster.errors import UserError
from clipcluster.runs.files import file_sha256


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("member", "parts"),
    [
        ("abc.url.txt", ("abc", "url.txt")),
        ("a/b.c/d.JPG", ("a/b.c/d", "jpg")),
        ("./d.png", ("./d", "png")),
        ("README", None),
        ("a/.hidden", None),
        ("__meta__/a.jpg", None),
    ],
)
def test_names_split_as_webdataset_splits_them(member: str, parts: tuple[str, str] | None) -> None:
    from webdataset.tariterators import base_plus_ext

    assert sample_name(member) == parts
    if parts and not member.startswith("__"):
        key, extension = base_plus_ext(member)
        assert (key, extension.lower()) == parts


def test_runs_of_members_become_samples(tmp_path: Path) -> None:
    members = [
        ("README", b"no sample"),
        ("a.JPG", b"image"), ("a.txt", b"a cat"), ("a.cls", b"3\n"),
        ("b.txt", b"no image"),
        ("c.json", json.dumps({"captions": ["x", "y"]}).encode()), ("c.png", b"i"), ("c.txt", b"z"),
        ("d.png", b"i"), ("d.png", b"again"),
        ("a.webp", b"the key again"), ("a.cls", b"seven"),
        ("e.seg.png", b"a mask alone"),
    ]  # fmt: skip
    path = tar_of(tmp_path / "0.tar", members)
    columns, *others = scan_shard(path, ("default",))
    assert others == [2, 2, None]
    assert columns["captions/default"].tolist() == [1, 2, 0]
    assert columns["class"].tolist() == [3, -1, -1]
    assert columns["image_size"].tolist() == [5, 1, 1]
    summary = index_folder(tmp_path)
    assert (summary.samples, summary.used, summary.captions, summary.without_caption) == (3, 2, 3, 1)
    assert (summary.without_image, summary.duplicates) == (2, 2)
    assert read_summary(tmp_path) == summary
    shards = open_folder(tmp_path)
    assert np.flatnonzero(shards.caption_counts()).tolist() == [0, 1]
    assert [shards.read(i).key for i in range(3)] == ["a", "c", "d"]
    assert shards.read(1).captions == ["x", "y"]


def test_another_captions_choice_is_refused_with_its_command(tmp_path: Path) -> None:
    record = json.dumps({"caption": "from img2dataset"}).encode()
    tar_of(tmp_path / "0.tar", [("a.jpg", b"i"), ("a.json", record), ("a.txt", b"one\ntwo")])
    index_folder(tmp_path)
    assert open_folder(tmp_path).read(0).captions == ["one\ntwo"]
    for choice, texts in (("lines", ["one", "two"]), ("json:caption", ["from img2dataset"])):
        command = f"clipcluster shards index {tmp_path} --captions {choice}"
        with pytest.raises(UserError, match=command):
            open_folder(tmp_path, captions_in=choice)
        index_folder(tmp_path, captions_choice=choice)
        assert open_folder(tmp_path, captions_in=choice).read(0).captions == texts


def test_what_is_missing_is_said_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="is a file; give a folder"):
        open_folder(tmp_path / "file")
    with pytest.raises(UserError, match="no such folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no \.tar shards"):
        open_folder(tmp_path)
    tar_of(tmp_path / "train" / "0.tar", [("a.jpg", b"i")])
    with pytest.raises(UserError, match="in its folders train; give one of them"):
        open_folder(tmp_path)
    (tmp_path / "0.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"0\.tar\.gz is compressed"):
        index_folder(tmp_path)
    tar_of(tmp_path / "0.tar", [("a.jpg", b"i")])
    with pytest.raises(UserError, match=f"no index; make it with: clipcluster shards index {tmp_path}$"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match="--index"):
        open_folder(tmp_path, index=tmp_path / "elsewhere")


def test_an_index_elsewhere_leaves_the_folder_alone(tmp_path: Path) -> None:
    folder, place = tmp_path / "shards", tmp_path / "index" / "of" / "them"
    tar_of(folder / "0.tar", [("a.jpg", b"image"), ("a.txt", b"cat")])
    index_folder(folder, place)
    assert os.listdir(folder) == ["0.tar"]
    assert sorted(os.listdir(place)) == ["0.tar.idx", COLUMNS_FILE, ENTRIES_FILE]
    shards = open_folder(folder, place)
    assert shards.read(0).image == b"image"
    assert shards.fingerprint == read_columns(place / COLUMNS_FILE).meta["fingerprint"]


def test_unchanged_shards_keep_their_rows(tmp_path: Path) -> None:
    for number in range(3):
        tar_of(tmp_path / f"{number}.tar", [(f"{number}.jpg", b"i"), (f"{number}.txt", b"cat")])
    first = index_folder(tmp_path)
    inodes = {path.name: path.stat().st_ino for path in tmp_path.glob("*.idx")}
    tar_of(tmp_path / "1.tar", [("x.jpg", b"i"), ("y.jpg", b"i")])
    tar_of(tmp_path / "3.tar", [("z.jpg", b"i")])
    (tmp_path / "0.tar").unlink()
    calls: list[tuple[int, int]] = []
    second = index_folder(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert (first.shards, first.samples, second.shards, second.samples) == (3, 3, 3, 4)
    assert calls == [(2, 3), (3, 3)]
    assert (tmp_path / "2.tar.idx").stat().st_ino == inodes["2.tar.idx"]
    assert read_summary(tmp_path) == second
    assert open_folder(tmp_path).shard_names == ["1.tar", "2.tar", "3.tar"]


def test_several_processes_build_the_same_index(tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    folder = make_shards(tmp_path / "s", 20, per_shard=6)
    index_folder(folder, tmp_path / "one")
    index_folder(folder, tmp_path / "two", workers=2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_writers_index_is_that_of_a_scan(tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    folder = make_shards(tmp_path / "s", 20, per_shard=6, bad={3})
    index_folder(folder, tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_a_cut_tar_is_used_as_far_as_it_goes_and_named(
    tmp_path: Path, make_shards: Callable[..., Path]
) -> None:
    folder = make_shards(tmp_path / "s", 14, per_shard=7)
    data = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(data[: len(data) // 2])
    summary = index_folder(folder)
    assert [entry["shard"] for entry in summary.broken] == ["00001.tar"]
    assert "cut" in summary.broken[0]["reason"]
    shards = open_folder(folder)
    assert 7 < shards.n_samples < 14
    assert [shards.read(i).key for i in range(shards.n_samples)] == [
        f"s{i:05d}" for i in range(shards.n_samples)
    ]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_are_keys(tmp_path: Path, form: int) -> None:
    key = "deep/" * 40 + "ü" * 90
    with tarfile.open(tmp_path / "0.tar", "w", format=form) as tar:
        for name, data in ((f"{key}.jpg", b"image"), (f"{key}.txt", b"a cat"), ("b.jpg", b"other")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert index_folder(tmp_path).samples == 2
    shards = open_folder(tmp_path)
    sample = shards.read(0)
    assert (sample.key, sample.image, sample.captions) == (key, b"image", ["a cat"])
    assert shards.read(1).key == "b"


def test_samples_of_links_are_counted_and_not_used(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (("a.jpg", tarfile.REGTYPE), ("b.jpg", tarfile.SYMTYPE), ("c.jpg", tarfile.LNKTYPE),
                           ("c.txt", tarfile.REGTYPE), ("d", tarfile.DIRTYPE), ("e.jpg", tarfile.REGTYPE),
                           ("e.txt", tarfile.SYMTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
    summary = index_folder(tmp_path)
    assert (summary.samples, summary.without_image, summary.without_caption) == (2, 2, 2)
    assert [open_folder(tmp_path).read(i).key for i in range(2)] == ["a", "e"]


def test_captions_that_cannot_be_read_are_counted_as_missing(tmp_path: Path) -> None:
    broken = {
        "a": {"txt": b"caf\xe9"}, "b": {"txt": b" \n"}, "c": {"json": b'{"captions": ["cut'},
        "d": {"json": b'{"captions": 7}'}, "e": {}, "f": {"json": b"[" * 5000},
        "g": {"json": b"", "txt": b"read"},
    }  # fmt: skip
    members = [
        (f"{key}.{name}", data)
        for key, texts in broken.items()
        for name, data in {"jpg": b"i", **texts}.items()
    ]
    tar_of(tmp_path / "0.tar", members)
    summary = index_folder(tmp_path)
    assert (summary.samples, summary.used, summary.without_caption) == (7, 1, 6)
    assert open_folder(tmp_path).read(6).captions == ["read"]


def test_compressed_tars_are_refused_by_content(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", [("a.jpg", b"i")])
    (tmp_path / "1.tar").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    with pytest.raises(UserError, match=r"1\.tar is compressed with gzip, whatever its name"):
        index_folder(tmp_path)
    (tmp_path / "1.tar").rename(tmp_path / "1.tar.gz")
    summary = index_folder(tmp_path)
    assert (summary.samples, summary.left_out) == (1, ["1.tar.gz"])


def test_empty_tars_count_nothing(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", [])
    tar_of(tmp_path / "1.tar", [("a.jpg", b"i")])
    (tmp_path / "2.tar").write_bytes(b"")
    assert index_folder(tmp_path).samples == 1
    shards = open_folder(tmp_path)
    assert shards.sample_counts.tolist() == [0, 1, 0]
    assert shards.locate(0) == (1, 0)


def test_many_captions_of_one_image_are_counted(tmp_path: Path) -> None:
    for number, count in enumerate((3, 300)):
        record = json.dumps({"captions": [f"c{i}" for i in range(count)]}).encode()
        tar_of(tmp_path / f"{number}.tar", [("a.jpg", b"i"), ("a.json", record)])
    index_folder(tmp_path)
    shards = open_folder(tmp_path)
    assert shards.caption_counts().tolist() == [3, 300]
    assert shards.n_pairs == 303
    assert shards.fields[0].counts.dtype == np.int32
    assert not shards.fields[0].counts.flags.owndata
    assert len(shards.read(1).captions) == 300


def test_columns_made_in_bulk_are_those_of_a_scan(tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    path = make_shards(tmp_path / "s", 5) / "00000.tar"
    columns = scan_shard(path, ("default",)).columns
    written = shard_index_path(path.parent, path.name).read_bytes()
    bulk = {name: column.astype(np.int64) for name, column in columns.items()}
    entry = write_entry(path, path.parent, ("default",), file_sha256(path), bulk)
    assert shard_index_path(path.parent, path.name).read_bytes() == written
    assert (entry.samples, entry.captions) == (5, {"default": int(columns["captions/default"].sum())})
    with pytest.raises(ValueError, match="one length"):
        write_entry(path, path.parent, ("default",), "", {**bulk, "class": bulk["class"][1:]})
