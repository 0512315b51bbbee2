"""`shards verify`: every byte is read again, and every sample is in the counts."""

import os
from pathlib import Path

import numpy as np
import pytest

from clipcluster.data.shards.indexing import index_folder
from clipcluster.errors import UserError
from tests.shard_writer import ShardWriter
from tools.convert.readers.digits import png
from tools.shards.verify import verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "s", samples_per_shard=4) as writer:
        for number in range(12):
            scan = np.full((8, 8), number)
            writer.add(f"k{number:02d}", b"<html>" if number == 6 else png(scan), "png", ["a", "b"])
    return tmp_path / "s"


def test_bad_images_are_counted_with_their_reason(folder: Path) -> None:
    report = verify(folder, workers=0)
    assert (report.shards, report.samples, report.captions, report.used) == (3, 12, 24, 11)
    assert report.bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert [(entry["shard"], entry["key"]) for entry in report.bad] == [("00001.tar", "k06")]
    assert "HTML" in report.bad[0]["reason"]
    assert report.kinds == {"PNG": 11}
    assert not report.broken
    assert not report.whole
    assert report.as_dict()["whole"] is False
    shallow = verify(folder, images=False)
    assert [entry["key"] for entry in shallow.bad] == ["k06"]  # by its first bytes
    assert (shallow.used, shallow.kinds) == (11, {"PNG": 11})


@pytest.mark.parametrize("way", ["flipped", "gone", "rows", "other rows", "unknown"])
def test_a_broken_shard_is_named(folder: Path, way: str) -> None:
    path, rows = folder / "00002.tar", folder / "00002.tar.idx"
    if way == "flipped":
        times = path.stat()
        data = bytearray(path.read_bytes())
        data[700] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # size and time hide it
    elif way == "gone":
        path.unlink()
    elif way == "rows":
        rows.write_bytes(rows.read_bytes()[:-200])
    elif way == "other rows":
        data = bytearray(rows.read_bytes())
        data[-64] ^= 1
        rows.write_bytes(data)
    else:
        (folder / "00003.tar").write_bytes(path.read_bytes())
    report = verify(folder, workers=0)
    reasons = {
        "flipped": "changed since it was indexed", "gone": "gone", "rows": "cannot be read",
        "other rows": "does not match the tar", "unknown": "not in the index",
    }  # fmt: skip
    assert [entry["shard"] for entry in report.broken] == ["00003.tar" if way == "unknown" else "00002.tar"]
    assert reasons[way] in report.broken[0]["reason"]
    assert report.samples == (12 if way == "unknown" else 8)
    assert report.used + len(report.bad) == report.samples


def test_a_cut_shard_is_named_and_its_samples_are_counted(folder: Path) -> None:
    path = folder / "00000.tar"
    path.write_bytes(path.read_bytes()[:-1024])
    index_folder(folder)
    report = verify(folder, workers=0)
    reason = report.broken[0]["reason"]
    assert report.broken == [{"shard": "00000.tar", "key": None, "reason": reason, "fault": "cut"}]
    assert "without the two zero blocks" in report.broken[0]["reason"]
    assert (report.samples, report.used) == (12, 11)


def test_without_an_index_it_says_what_to_do(folder: Path) -> None:
    (folder / "index.bin").unlink()
    with pytest.raises(UserError, match="clipcluster shards index"):
        verify(folder, workers=0)
    index_folder(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged .*with: clipcluster shards index"):
        verify(folder, workers=0)


def test_notes_break_nothing(folder: Path) -> None:
    with ShardWriter(folder / "more", samples_per_shard=4) as writer:
        writer.add_members("a", {"png": png(np.eye(8))})
        writer.add_members("a", {"png": png(np.eye(8))})
        writer.add_members("b", {"png": png(np.eye(8))})
    (folder / "00003.tar.gz").write_bytes(b"packed")
    (folder / "00000.tar").write_bytes((folder / "more" / "00000.tar").read_bytes())
    (folder / "00001.tar").write_bytes(bytes(1024))
    index_folder(folder)
    report = verify(folder, workers=0)
    assert report.whole
    assert (report.samples, report.duplicates) == (6, 1)
    assert report.notes == [
        "00001.tar: holds no sample with an image",
        "00003.tar.gz: compressed, not read; unpack it to .tar first",
    ]


def test_processes_find_the_same(folder: Path) -> None:
    assert verify(folder, workers=2, images=False) == verify(folder, workers=0, images=False)
