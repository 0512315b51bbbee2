"""Opening, reading by offset, and noticing that shards are not what they were."""

import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from clipcluster.data.shards import opened as module
from clipcluster.data.shards.indexing import index_folder
from clipcluster.data.shards.open import open_folder, open_source
from clipcluster.errors import UserError
from clipcluster.recipe.sections.data import Source
from clipcluster.runtime.outcome import DataError


@pytest.fixture
def folder(tmp_path: Path, make_shards: Callable[..., Path]) -> Path:
    return make_shards(tmp_path / "set" / "train", 20, per_shard=6)


def _source(**keys: object) -> Source:
    return Source.model_validate(keys)


def test_every_sample_reads_as_webdataset_reads_it(folder: Path) -> None:
    shards = open_folder(folder)
    paths = [str(shards.shard_path(i)) for i in range(len(shards))]
    others = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert shards.n_samples == len(others) == 20
    for position, other in enumerate(others):
        sample = shards.read(position)
        assert (sample.key, sample.image, str(sample.cls).encode()) == (
            other["__key__"],
            other["png"],
            other["cls"],
        )
        assert sample.captions == [f"caption {i} of {position}" for i in range(1 + position % 3)]
        assert sample.captions[0].encode() == other["txt"]
        assert Path(other["__url__"]).name == sample.shard
    assert shards.n_pairs == sum(1 + i % 3 for i in range(20))
    assert shards.name == "train"


def test_a_position_that_is_not_there(folder: Path) -> None:
    shards = open_folder(folder)
    assert shards.locate(19) == (3, 1)
    for position in (-1, 20):
        with pytest.raises(IndexError, match="20 samples"):
            shards.read(position)


def test_it_travels_as_paths_alone(folder: Path) -> None:
    shards = open_folder(folder)
    shards.read(0)
    data = pickle.dumps(shards)
    assert len(data) < 1000
    other = pickle.loads(data)
    assert other.read(7) == shards.read(7)
    (folder / "00000.tar").write_bytes((folder / "00001.tar").read_bytes())
    index_folder(folder)
    with pytest.raises(DataError, match="was rebuilt"):
        pickle.loads(data)


def test_few_files_stay_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPEN_SHARDS", 2)
    shards = open_folder(folder)
    before = len(os.listdir("/proc/self/fd"))
    for position in [0, 7, 13, 19, 0, 13]:
        shards.read(position)
        assert len(os.listdir("/proc/self/fd")) <= before + 4  # the tar and its mapped rows
    shards.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("way", ["other bytes", "longer", "gone"])
def test_a_changed_shard_is_refused_by_name(folder: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRIES", (0.0,))
    path = folder / "00002.tar"
    data = bytearray(path.read_bytes())
    if way == "other bytes":
        data[600] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(0, time.time_ns() + 10**9))
    elif way == "longer":
        path.write_bytes(data + bytes(512))
    else:
        path.unlink()
    shards = open_folder(folder)
    shards.read(0)
    for action in (lambda: shards.read(13), lambda: shards.announce([0, 13]), shards.check_unchanged):
        with pytest.raises(DataError, match=r"00002\.tar") as caught:
            action()
        assert "clipcluster shards index" in caught.value.advice


def test_a_new_time_with_the_same_bytes_is_no_change(folder: Path) -> None:
    shards = open_folder(folder)
    os.utime(folder / "00002.tar")
    shards.check_unchanged()
    assert shards.read(13).key == "s00013"


def test_bytes_are_hashed_once_for_each_new_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    real = module.file_sha256

    def counting(path: Path) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(module, "file_sha256", counting)
    shards = open_folder(folder)
    os.utime(folder / "00002.tar")
    for _ in range(3):
        shards.check_unchanged()
        shards.read(13)
        shards.close()
    assert hashed == [folder / "00002.tar"]
    (folder / "00002.tar").write_bytes(b"x" * (folder / "00002.tar").stat().st_size)
    with pytest.raises(DataError):
        shards.check_unchanged()


def test_what_another_process_has_compared_is_not_hashed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(folder / "00002.tar")
    shards = open_folder(folder)
    found = shards.modified_shards()
    assert list(found) == [2]
    shards.mark_unchanged(found)
    assert shards.modified_shards() == {}
    monkeypatch.setattr(module, "file_sha256", lambda path: pytest.fail(f"{path} is hashed"))
    there = pickle.loads(pickle.dumps(shards))
    assert there.read(13).key == "s00013"
    os.utime(folder / "00002.tar", (1, 1))
    assert list(there.modified_shards()) == [2]  # a later time asks again


def test_the_rows_must_belong_to_the_list(folder: Path) -> None:
    shutil.copy(folder / "00001.tar.idx", folder / "00002.tar.idx")
    with pytest.raises(DataError, match=r"00002\.tar\.idx"):
        open_folder(folder).read(13)


def test_a_failing_disk_is_tried_again_then_raised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRIES", (0.0, 0.0))
    real, failures = os.pread, [2]

    def pread(fd: int, size: int, offset: int) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise OSError(5, "Input/output error")
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert open_folder(folder).read(7).key == "s00007"
    failures[0] = 3
    with pytest.raises(OSError, match=r"Input/output error \(tried 3 times\).*00001\.tar"):
        open_folder(folder).read(7)


def test_the_fingerprint_knows_names_and_contents_alone(
    folder: Path, tmp_path: Path, make_shards: Callable[..., Path]
) -> None:
    first = open_folder(folder).fingerprint
    moved = shutil.copytree(folder, tmp_path / "moved")
    index_folder(moved, again=True)
    assert open_folder(moved).fingerprint == first
    (moved / "00000.tar").rename(moved / "x.tar")
    index_folder(moved)
    assert open_folder(moved).fingerprint != first
    assert open_folder(make_shards(tmp_path / "other", 20, per_shard=6, bad={1})).fingerprint != first


def test_sources_as_recipes_write_them(
    folder: Path, tmp_path: Path, make_shards: Callable[..., Path]
) -> None:
    second = make_shards(tmp_path / "set" / "more", 5)
    whole = open_source(_source(shards=str(folder)), text=True)
    both = open_source(_source(shards=[str(folder), str(second)]), text=True)
    assert (both.n_samples, both.n_pairs) == (25, whole.n_pairs + sum(1 + i % 3 for i in range(5)))
    assert both.read(20).key == "s00000"
    assert list(both.caption_counts()) == [1 + i % 3 for i in range(20)] + [1 + i % 3 for i in range(5)]
    some = open_source(_source(shards=f"{folder}/{{00001..00002}}.tar"), text=True)
    assert [some.read(i).key for i in range(some.n_samples)] == [f"s{i:05d}" for i in range(6, 18)]
    assert some.n_pairs == sum(some.caption_counts()) == sum(1 + i % 3 for i in range(6, 18))
    assert open_source(_source(shards=f"{folder}/*.tar"), text=True).fingerprint == whole.fingerprint
    assert (
        open_source(_source(shards=f"{tmp_path}/set/{{train,more}}"), text=True).fingerprint
        == both.fingerprint
    )
    assert pickle.loads(pickle.dumps(some)).read(0) == some.read(0)


def test_sources_that_cannot_be_read(folder: Path, tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    gone = r"00004\.tar does not exist \(6 of 10 shards are not there\); name .* folder has 4 shards"
    with pytest.raises(UserError, match=gone):
        open_source(_source(shards=f"{folder}/{{00000..00009}}.tar"), text=True)
    with pytest.raises(UserError, match=r"/x\*\.tar does not exist \(1 of 1 shard is not there\)"):
        open_source(_source(shards=f"{folder}/x*.tar"), text=True)
    shutil.copy(folder / "00000.tar", folder / "00009.tar")
    with pytest.raises(
        UserError, match=r"00009\.tar: not in .* \(1 of 2 shards is not\), which names 4 shards"
    ):
        open_source(_source(shards=f"{folder}/{{00000,00009}}.tar"), text=True)
    silent = make_shards(tmp_path / "silent", 3, texts=lambda number: [])
    with pytest.raises(UserError, match="no sample has a caption"):
        open_source(_source(shards=str(silent)), text=True)
    assert open_source(_source(shards=str(silent)), text=False).n_samples == 3


def test_class_names_beside_the_tars_or_above(folder: Path) -> None:
    shards = open_folder(folder)
    assert shards.classnames is None
    (folder.parent / "classnames.txt").write_text("cat\ndog\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n\n")
    assert shards.classnames == ["cat", "dog"]
    assert shards.templates == ["a {c}"]


def test_no_torch_is_imported(folder: Path) -> None:
    code = (
        "import sys; import clipcluster.data.shards.folder_index\n"
        "from clipcluster.data.shards.open import open_folder\n"
        f"open_folder({str(folder)!r}).check_unchanged(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
