"""The writer, against the readers that others use."""

import json
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset

from clipcluster.data.shards.open import open_folder
from tools.convert.shard_writer import ShardWriter

SAMPLES = [
    ("a", b"\x89PNG one", "png", ["a cat", "zwei Katzen: ü"], 3),
    ("folder/" + "b" * 120, b"\xff\xd8\xff two" * 200, "jpg", ["line one\nline two"], None),
    ("é", b"", "webp", [], 0),
]


def _write(folder: Path, per_shard: int = 2) -> Path:
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for key, image, extension, texts, cls in SAMPLES:
            writer.add(key, image, extension, texts, fields={"id": key.upper()}, cls=cls)
    return folder


def test_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    folder = _write(tmp_path)
    paths = sorted(str(path) for path in folder.glob("*.tar"))
    read = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert len(paths) == 2
    assert len(read) == 3
    for sample, (key, image, extension, texts, cls) in zip(read, SAMPLES, strict=True):
        assert sample["__key__"] == key
        assert sample[extension] == image
        assert json.loads(sample["json"]) == {"captions": texts, "id": key.upper()}
        assert sample.get("txt") == (texts[0].encode() if texts else None)
        assert sample.get("cls") == (None if cls is None else str(cls).encode())


def test_tarfile_and_the_systems_tar_list_the_members(tmp_path: Path) -> None:
    folder = _write(tmp_path, per_shard=10)
    with tarfile.open(folder / "00000.tar") as tar:
        names = tar.getnames()
        assert {info.mtime for info in tar} == {0}
    assert names[:4] == ["a.png", "a.json", "a.txt", "a.cls"]
    listed = subprocess.run(
        ["tar", "tf", folder / "00000.tar", "--quoting-style=literal"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout.splitlines() == names
    assert listed.stderr == ""


def test_our_own_reader_reads_it_without_another_scan(tmp_path: Path) -> None:
    shards = open_folder(_write(tmp_path))
    shards.check_unchanged()
    for position, (key, image, _, texts, cls) in enumerate(SAMPLES):
        sample = shards.read(position)
        assert (sample.key, sample.image, sample.captions) == (key, image, texts)
        assert sample.cls == (-1 if cls is None else cls)


@pytest.mark.parametrize(
    ("key", "extension"), [("a.b", "png"), ("a", "PNG"), ("", "png"), ("__a__/b", "png")]
)
def test_a_key_that_cannot_be_read_back_is_refused(tmp_path: Path, key: str, extension: str) -> None:
    with pytest.raises(ValueError, match="told apart"):
        ShardWriter(tmp_path).add_members(key, {extension: b"x"})


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = _write(tmp_path / "one"), _write(tmp_path / "two")
    for path in one.iterdir():
        if path.suffix == ".tar":
            assert path.read_bytes() == (two / path.name).read_bytes()
    assert open_folder(one).fingerprint == open_folder(two).fingerprint


def test_an_exception_leaves_no_index_and_no_half_shard(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, samples_per_shard=1) as writer:  # noqa: PT012
        writer.add("a", b"x", "png", ["a"])
        writer.add_members("b", {"png": b"x"})
        writer.samples_per_shard = 5
        writer.add("c", b"x", "png", ["c"])
        raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.tar", "00000.tar.idx", "00001.tar", "00001.tar.idx",
    ]  # fmt: skip
