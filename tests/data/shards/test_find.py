"""Which folders of shards are meant by one that a person gives."""

from collections.abc import Callable
from pathlib import Path

import pytest

from clipcluster.data.shards.find import find_shards, folders_of_shards
from clipcluster.errors import UserError


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """made(*names): a folder with these files, empty."""

    def make(*names: str) -> Path:
        for name in names:
            path = tmp_path / "given" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "given"

    return make


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (["0.tar", "train/0.tar"], ["."]),
        (["shards/0.tar", "notes.txt"], ["shards"]),
        (["train/0.tar"], ["train"]),
        (["test/0.tar", "train/0.tar", "val/0.tar", "images/a.jpg"], ["train", "val", "test"]),
        (["train/0.tar", "test/readme"], ["train"]),
        (["wds/train/0.tar", "wds/test/0.tar"], ["wds/train", "wds/test"]),
        (["a/b/c/0.tar"], ["a/b/c"]),
        ([".cache/0.tar", "a/0.tar", "a/.1.tar"], ["a"]),
    ],
)
def test_folders_that_are_meant(made: Callable[..., Path], names: list[str], meant: list[str]) -> None:
    folder = made(*names)
    found = folders_of_shards(folder)
    assert [str(path.relative_to(folder)) for path in found] == meant
    assert all(find_shards(path) for path in found)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a/0.tar", "b/0.tar"], "the shards are in its folders a, b; give one of them"),
        (["a/x", "b/y"], r"no \.tar shards in this folder; shards are made by"),
        (["x"], r"no \.tar shards in this folder"),
        (["0.tar.gz", "1.tgz"], r"0\.tar\.gz is compressed"),
    ],
)
def test_folders_that_mean_none(made: Callable[..., Path], names: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        folders_of_shards(made(*names))


def test_a_folder_that_is_none_is_said_by_who_reads_it(tmp_path: Path) -> None:
    assert folders_of_shards(tmp_path / "no") == [tmp_path / "no"]
    with pytest.raises(UserError, match="no such folder"):
        find_shards(tmp_path / "no")
