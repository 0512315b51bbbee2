"""`shards index`: several folders, or one with its index elsewhere."""

import sys
from pathlib import Path

import pytest

from clipcluster.data.shards.open import open_folder
from clipcluster.data.shards.shard_list import read_summary
from clipcluster.errors import UserError
from jobs.cli.app import main
from tests.shard_writer import ShardWriter
from tools.shards.index import index_folders


def _folder(path: Path, samples: int) -> Path:
    with ShardWriter(path, samples_per_shard=3) as writer:
        for number in range(samples):
            writer.add_members(f"{number:03d}", {"jpg": b"i", "txt": b"one\ntwo"})
    for file in path.iterdir():
        if file.suffix != ".tar":
            file.unlink()
    return path


def test_several_folders(tmp_path: Path) -> None:
    folders = [_folder(tmp_path / "a", 4), _folder(tmp_path / "b", 7)]
    seen: list[tuple[int, int]] = []
    done = index_folders(folders, captions="lines", progress=lambda at, of: seen.append((at, of)))
    assert [(summary.shards, summary.samples, summary.captions) for summary in done] == [
        (2, 4, 8),
        (3, 7, 14),
    ]
    assert seen == [(1, 2), (2, 2), (1, 3), (2, 3), (3, 3)]
    assert open_folder(folders[1], captions_in="lines").read(6).captions == ["one", "two"]


def test_one_index_elsewhere_for_one_folder(tmp_path: Path) -> None:
    folders = [_folder(tmp_path / "a", 1), _folder(tmp_path / "b", 1)]
    with pytest.raises(UserError, match="one folder, and 2 were given"):
        index_folders(folders, index=tmp_path / "index")
    (summary,) = index_folders(folders[:1], index=tmp_path / "index")
    assert summary.index == tmp_path / "index"
    assert open_folder(folders[0], tmp_path / "index").n_samples == 1


def test_all_folders_are_looked_at_before_any_is_indexed(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a", 1)
    with pytest.raises(UserError, match="no such folder"):
        index_folders([folder, tmp_path / "b"])
    assert not (folder / "index.bin").exists()


def test_an_empty_file_is_a_shard_of_the_list(tmp_path: Path) -> None:
    (tmp_path / "0.tar").touch()
    index_folders([tmp_path])
    assert read_summary(tmp_path).shards == 1


def test_no_worker_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["clipcluster", "shards", "index", ".", "--workers", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "'--workers'" in capsys.readouterr().err


def test_choices_stand_side_by_side(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a", 4)
    index_folders([folder], captions=["lines", "txt"])
    (summary,) = index_folders([folder], captions=["default"])
    assert {name: counts.captions for name, counts in summary.choices.items()} == {
        "lines": 8,
        "txt": 4,
        "default": 4,
    }
