"""`shards verify --repair`: repairs what can be repaired, deletes nothing, blesses no damage."""

import gzip
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from clipcluster.data.shards.open import open_folder
from clipcluster.errors import UserError
from tests.shard_writer import ShardWriter
from tools.convert.readers.digits import png
from tools.shards.repair import repair_folder
from tools.shards.verify import verify


def _make(folder: Path, samples: int, first: int = 0) -> Path:
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for number in range(first, first + samples):
            writer.add(f"k{number:02d}", png(np.full((8, 8), number)), "png", ["a", "b"])
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _make(tmp_path / "s", 12)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _done(folder: Path) -> list[tuple[str, bool]]:
    return [(deed.file, deed.done) for deed in repair_folder(folder)]


def test_what_is_whole_is_not_touched(folder: Path) -> None:
    before = _bytes(folder)
    assert repair_folder(folder) == []
    assert _bytes(folder) == before


@pytest.mark.parametrize("lost", ["index.bin", "index.json", "00001.tar.idx"])
def test_an_index_that_is_lost_or_damaged_is_made_again(folder: Path, lost: str) -> None:
    before = _bytes(folder)
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:40])):
        damage(folder / lost)
        assert all(deed.done for deed in repair_folder(folder))
        assert verify(folder, workers=0).whole
        assert _bytes(folder) == before


def test_rows_of_another_shard_are_made_again(folder: Path) -> None:
    before = _bytes(folder)
    shutil.copy(folder / "00000.tar.idx", folder / "00002.tar.idx")
    assert _done(folder) == [("00002.tar.idx", True)]
    assert _bytes(folder) == before


def test_new_shards_and_those_written_anew_are_indexed(folder: Path, tmp_path: Path) -> None:
    more = _make(tmp_path / "more", 7, first=50)
    shutil.copy(more / "00000.tar", folder / "00007.tar")
    shutil.copy(more / "00001.tar", folder / "00001.tar")
    assert sorted(_done(folder)) == [("00001.tar", True), ("00007.tar", True), ("index.json", True)]
    report = verify(folder, workers=0)
    assert report.whole
    assert (report.shards, report.samples) == (4, 15)
    assert [open_folder(folder).read(position).key for position in (0, 4, 7, 14)] == [
        "k00",
        "k54",
        "k08",
        "k53",
    ]


def _cut(folder: Path) -> None:
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[:-3000])


@pytest.mark.parametrize("indexed", [True, False])
def test_of_a_cut_shard_the_whole_samples_are_kept_and_the_original_too(folder: Path, indexed: bool) -> None:
    _cut(folder)
    cut = (folder / "00001.tar").read_bytes()
    if not indexed:
        (folder / "index.bin").unlink()
    deeds = repair_folder(folder)
    assert [deed.file for deed in deeds] == ["00001.tar", "index.json"]
    assert "3 complete samples" in deeds[0].what
    assert "00001.tar.broken" in deeds[0].what
    assert (folder / "00001.tar.broken").read_bytes() == cut
    report = verify(folder, workers=0)
    assert report.whole
    assert report.samples == 11
    assert "00001.tar.broken: the original" in report.notes[0]
    assert repair_folder(folder) == []


def test_behind_the_end_of_a_tar_nothing_is_lost(folder: Path) -> None:
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes() + (folder / "00002.tar").read_bytes())
    repair_folder(folder)
    report = verify(folder, workers=0)
    assert report.whole
    assert report.samples == 16


def test_bit_rot_is_not_blessed(folder: Path) -> None:
    path = folder / "00002.tar"
    state, data = path.stat(), bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    before = _bytes(folder)
    for rows in (True, False):
        if not rows:
            (folder / "00002.tar.idx").unlink()
            del before["00002.tar.idx"]
        (deed,) = repair_folder(folder)
        assert (deed.file, deed.done) == ("00002.tar", False)
        assert "restore it" in deed.what
        assert _bytes(folder) == before
        assert not verify(folder, workers=0).whole


def test_a_shard_that_is_gone_stays_on_the_list(folder: Path) -> None:
    (folder / "00000.tar").rename(folder / "elsewhere")
    _cut(folder)
    deeds = repair_folder(folder)
    assert [(deed.file, deed.done) for deed in deeds] == [
        ("00000.tar", False), ("00001.tar", True), ("index.json", False)
    ]  # fmt: skip
    assert "restore it" in deeds[0].what
    (folder / "elsewhere").rename(folder / "00000.tar")
    repair_folder(folder)
    assert verify(folder, workers=0).samples == 11


def test_halves_are_removed_when_nobody_writes_them_any_more(folder: Path) -> None:
    old, new = folder / ".00009.tar.part", folder / ".index.json.7.part"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (time.time() - 3600,) * 2)
    assert _done(folder) == [(".00009.tar.part", True), (".index.json.7.part", False)]
    assert (old.exists(), new.exists()) == (False, True)


def test_nothing_to_save_is_left_and_said(folder: Path) -> None:
    (folder / "00001.tar").write_bytes(b"\x1f\x8b" + bytes(range(256)) * 10)
    deeds = repair_folder(folder)
    assert ("00001.tar", False) in [(deed.file, deed.done) for deed in deeds]
    assert not (folder / "00001.tar.broken").exists()
    assert not verify(folder, workers=0).whole


def _refusing(folder: Path) -> None:
    for path in [folder, *folder.iterdir()]:
        path.chmod(path.stat().st_mode & ~0o222)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    _cut(folder)
    _refusing(folder)
    with pytest.raises(UserError, match="cannot be repaired"):
        repair_folder(folder)


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        repair_folder(tmp_path / "x")
    with pytest.raises(UserError, match=r"no \.tar shards"):
        repair_folder(tmp_path)


def test_a_compressed_shard_does_not_hide_what_was_repaired(folder: Path) -> None:
    (folder / "00001.tar").write_bytes(gzip.compress((folder / "00001.tar").read_bytes()))
    cut = folder / "00002.tar"
    cut.write_bytes(cut.read_bytes()[:-3000])
    deeds = {deed.file: deed for deed in repair_folder(folder)}
    assert deeds["00002.tar"].done
    assert not deeds["00001.tar"].done
    assert not deeds["index.json"].done
    assert "00001.tar is compressed with gzip" in deeds["index.json"].what
