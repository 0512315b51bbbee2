"""Sources behind servers and commands read as local ones do, through breaks, and within the cache's bound."""

import hashlib
import os
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.indexing import index_folder
from clipcluster.data.shards.open import open_folder, open_source
from clipcluster.data.storage import download
from clipcluster.data.storage import urls as remote
from clipcluster.data.storage.cache import Cache
from clipcluster.errors import UserError
from clipcluster.recipe.sections.data import Source
from clipcluster.runtime.outcome import DataError
from tools.shards.index import index_folders
from tools.shards.remote_index import index_remote


@pytest.fixture
def folder(tmp_path: Path, make_shards: Callable[..., Path]) -> Path:
    return make_shards(tmp_path / "served" / "train", 40, per_shard=2)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"), 1 << 20)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RETRIES", (0.01, 0.02, 0.03))


def _source(**keys: object) -> Source:
    return Source.model_validate(keys)


def all_of(shards: Dataset) -> list[Any]:
    return [shards.read(position) for position in range(shards.n_samples)]


@pytest.mark.usefixtures("hurried")
def test_a_server_that_breaks_every_fifth_connection(
    folder: Path, cache: Cache, web_server: Callable[..., Any]
) -> None:
    server = web_server(folder.parent, drop_every=5)
    shards = open_source(_source(shards=f"{server.address}/train"), text=True, cache=cache)
    local = open_folder(folder)
    assert (shards.fingerprint, shards.name) == (local.fingerprint, "train")
    assert all_of(shards) == all_of(local)
    tars = [entry for entry in server.log if entry[1].endswith(".tar")]
    assert len(tars) == 20 + 4 + 0  # 20 shards, every fifth body broken
    assert sum(first > 0 for _, _, first, _ in tars) == 4  # and gone on with where it broke


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(("known", "hides_length"), [(False, False), (True, False), (True, True)])
def test_a_transfer_that_goes_on_without_a_size(
    tmp_path: Path, cache: Cache, web_server: Callable[..., Any], known: bool, hides_length: bool
) -> None:
    """`206 bytes N-M/*`, with and without a size told before: the file has every byte that was counted."""
    data = bytes(range(1, 256)) * 500
    (tmp_path / "0.tar").write_bytes(data)
    server = web_server(tmp_path, drop_every=2)
    server.bodies, server.hides_size, server.hides_length = 1, True, hides_length
    digest = hashlib.sha256(data).hexdigest()
    address = f"{server.address}/0.tar"
    if known:
        fd = cache.shard(address, len(data), digest)
    else:
        fd, got = cache.unnamed(address)
        assert (got.size, got.sha256) == (len(data), digest)
    try:
        assert os.pread(fd, len(data) + 1, 0) == data
    finally:
        os.close(fd)
    assert [first for _, _, first, _ in server.log] == [0, len(data) // 2 - 1]
    assert hashlib.sha256((Path(cache.folder) / f"{digest}.tar").read_bytes()).hexdigest() == digest


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("known", [False, True])
def test_a_transfer_that_breaks_after_its_last_byte(
    tmp_path: Path, web_server: Callable[..., Any], known: bool
) -> None:
    """Nothing is left to go on with, and a server refuses to send nothing."""
    data = os.urandom(5000)
    (tmp_path / "0.tar").write_bytes(data)
    server, digest = web_server(tmp_path, drop_every=2), hashlib.sha256(data).hexdigest()
    server.bodies, server.chunked = 1, True
    cache, address = Cache(str(tmp_path / "cache"), 1 << 25), f"{server.address}/0.tar"
    fd = cache.shard(address, len(data), digest) if known else cache.unnamed(address)[0]
    try:
        assert os.pread(fd, len(data) + 1, 0) == data
    finally:
        os.close(fd)
    assert [entry[2:] for entry in server.log] == [(0, 200), (len(data) - 1, 206)]


def test_the_file_is_verified_and_not_what_came(
    tmp_path: Path, cache: Cache, web_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that keeps other bytes than it was given: the file gets no name."""
    data = os.urandom(5000)
    (tmp_path / "0.tar").write_bytes(data)
    server, real = web_server(tmp_path), os.pwrite
    monkeypatch.setattr(download, "RETRIES", (0.01,))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: real(fd, os.urandom(len(view)), at))
    with pytest.raises(OSError, match="a hash that is not the index"):
        cache.shard(f"{server.address}/0.tar", len(data), hashlib.sha256(data).hexdigest())
    assert not list(Path(cache.folder).glob("*.tar"))


def test_tars_by_braces_through_an_index_on_this_machine(
    folder: Path,
    cache: Cache,
    tmp_path: Path,
    web_server: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLIPCLUSTER_CACHE", str(tmp_path / "of the user"))
    served = tmp_path / "served" / "bare"
    served.mkdir()
    for tar in folder.glob("*.tar"):
        (served / tar.name).write_bytes(tar.read_bytes())
    server = web_server(served)
    beside = web_server(folder)
    written = server.address + "/{00000..00009}.tar"
    with pytest.raises(UserError, match=r"no index .*--index FOLDER"):
        open_source(_source(shards=written), text=True, cache=cache)
    with pytest.raises(UserError, match="cannot list"):
        index_folders([server.address], index=tmp_path / "index")
    with pytest.raises(UserError, match="--index FOLDER"):
        index_folders([written])
    (summary,) = index_folders([written], index=tmp_path / "index", workers=2)
    assert (summary.shards, summary.samples) == (10, 20)
    source = _source(shards=written, index=str(tmp_path / "index"))
    shards = open_source(source, text=True, cache=cache)
    assert all_of(shards) == all_of(open_folder(folder))[:20]
    assert shards.modified_shards() == {}
    assert shards.folders[0].taken is None
    same = open_source(_source(shards=written, index=beside.address), text=True, cache=cache)
    assert (same.fingerprint, same.read(7)) == (shards.fingerprint, shards.read(7))
    some = open_source(
        _source(shards=f"{server.address}/{{00001,00003}}.tar", index=source.index), text=True, cache=cache
    )
    assert some.shard_names == ["00001.tar", "00003.tar"]
    with pytest.raises(UserError, match=r"00011\.tar: not in the index"):
        open_source(_source(shards=f"{server.address}/00011.tar", index=source.index), text=True, cache=cache)


@pytest.mark.usefixtures("hurried")
def test_an_index_that_was_broken_off_goes_on(
    folder: Path, tmp_path: Path, web_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPCLUSTER_CACHE", str(tmp_path / "of the user"))
    server = web_server(folder)
    written = server.address + "/{00000..00019}.tar"
    server.status, server.status_of = 500, "7.tar"
    with pytest.raises(UserError, match=r"/00007\.tar: .*500.*; the same command continues"):
        index_folders([written], index=tmp_path / "index")
    assert not (tmp_path / "index" / "index.bin").exists()
    server.status = None
    server.log.clear()
    (made,) = index_folders([written], index=tmp_path / "index")
    assert made.samples == 40
    fetched = [path for method, path, *_ in server.log if method == "GET" and path.endswith(".tar")]
    assert "/00007.tar" in fetched
    assert set(fetched) <= {f"/{number:05d}.tar" for number in range(7, 20)}
    assert not list((tmp_path / "index").glob(".*"))


@pytest.mark.usefixtures("hurried")
def test_a_server_that_always_fails(folder: Path, cache: Cache, web_server: Callable[..., Any]) -> None:
    server = web_server(folder)
    shards = open_source(_source(shards=server.address), text=True, cache=cache)
    server.status = 503
    began = time.monotonic()
    with pytest.raises(OSError, match=r"answers 503 .*\(tried 4 times\).*00000\.tar"):
        shards.read(0)
    assert time.monotonic() - began < 2
    assert len([entry for entry in server.log if entry[3] == 503]) == 4
    server.status = 404
    for action in (lambda: shards.read(0), lambda: shards.announce([0, 2])):
        with pytest.raises(DataError, match=r"00000\.tar is missing"):
            action()
    server.status = None
    assert shards.read(0).key == "s00000"
    assert not list(Path(cache.folder).glob("*.part"))


@pytest.mark.usefixtures("hurried")
def test_other_content_than_was_indexed(folder: Path, cache: Cache, web_server: Callable[..., Any]) -> None:
    server = web_server(folder)
    shards = open_source(_source(shards=server.address), text=True, cache=cache)
    tar = folder / "00003.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole + bytes(512))
    with pytest.raises(DataError, match=r"00003\.tar changed .*bytes, the index has"):
        shards.read(6)
    assert list(shards.modified_shards()) == [3]
    with pytest.raises(DataError, match=r"00003\.tar changed"):
        shards.check_unchanged()
    tar.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    with pytest.raises(DataError, match=r"00003\.tar changed .*sha256"):
        shards.read(6)
    assert len([1 for method, path, *_ in server.log if (method, path) == ("GET", "/00003.tar")]) == 3
    tar.write_bytes(whole)
    assert shards.read(6).key == "s00006"


def test_an_index_that_was_made_anew(
    folder: Path, cache: Cache, web_server: Callable[..., Any], make_shards: Callable[..., Path]
) -> None:
    server = web_server(folder)
    before = open_source(_source(shards=server.address), text=True, cache=cache)
    make_shards(folder.parent / "more", 3, per_shard=3)
    (folder.parent / "more" / "00000.tar").rename(folder / "more.tar")
    index_folder(folder)
    after = open_source(_source(shards=server.address), text=True, cache=cache)
    assert (before.n_samples, after.n_samples) == (40, 43)
    assert after.read(42).key == "s00002"
    assert pickle.loads(pickle.dumps(before)).read(39) == before.read(39)
    for rows in folder.glob("*.idx"):
        rows.write_bytes(rows.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"the index of .* is damaged: .*is cut"):
        after.read(0)


def test_commands(folder: Path, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPCLUSTER_CACHE", str(tmp_path / "of the user"))
    written = f"pipe:cat {folder}/{{00000..00019}}.tar"
    with pytest.raises(UserError, match="index: FOLDER"):
        open_source(_source(shards=written), text=True, cache=cache)
    with pytest.raises(UserError, match=r"ends in \.tar"):
        open_source(_source(shards="pipe:cat it", index=str(folder)), text=True, cache=cache)
    index_folders([written], index=tmp_path / "index")
    shards = open_source(_source(shards=written, index=str(tmp_path / "index")), text=True, cache=cache)
    assert all_of(shards) == all_of(open_folder(folder))
    assert shards.modified_shards() == {}


@pytest.mark.usefixtures("hurried")
def test_a_command_that_fails(folder: Path, cache: Cache) -> None:
    shards = open_source(
        _source(
            shards="pipe:echo key=hunter2: no such bucket >&2; echo x/{00000..00019}.tar; exit 3",
            index=str(folder),
        ),
        text=True,
        cache=cache,
    )
    with pytest.raises(OSError, match=r"failed with code 3: .* no such bucket \(tried 4 times\)") as raised:
        shards.read(0)
    assert "hunter2" not in "".join(traceback.format_exception(raised.value))


def test_a_dataset_on_the_hub(
    folder: Path, cache: Cache, web_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = folder.parent / "datasets" / "org" / "set" / "resolve" / "v1"
    at.mkdir(parents=True)
    folder.rename(at / "train")
    server = web_server(folder.parent)
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as in a job
    shards = open_source(_source(shards="hf://datasets/org/set@v1/train"), text=True, cache=cache)
    assert all_of(shards) == all_of(open_folder(at / "train"))
    with pytest.raises(UserError, match="write hf://datasets/OWNER/NAME/FILE"):
        open_source(_source(shards="hf://train"), text=True, cache=cache)


@given(
    folder=st.text("abc/{}[]*", max_size=8),
    numbers=st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True),
)
def test_braces_and_globs_take_what_is_there(folder: str, numbers: list[int]) -> None:
    names = [f"{number:03d}.tar" for number in sorted(numbers)]
    every = remote.named("http://host/x/{000..099}.tar")
    (some,) = remote.named("http://host/x/{" + ",".join(name[:3] for name in [*names, names[0]]) + "}.tar")
    assert len(every) == 1
    assert every[0].folder == some.folder == remote.RemoteFolder("http://host/x")
    assert remote.chosen(some.folder, some.tars or (), every[0].tars or ()) == names
    bucket = remote.RemoteFolder("s3://b/x")
    assert remote.chosen(bucket, ["0*.tar"], [*names, "other.tar"]) == names
    assert not remote.is_remote(folder)


def test_addresses_in_words() -> None:
    folder = remote.folder_at("https://user:secret@host/a%20b/train/?sig=key")
    assert (folder.name, str(folder)) == ("train", "https://host/a%20b/train")
    assert (folder / "0 1.tar").address == "https://user:secret@host/a%20b/train/0%201.tar?sig=key"
    assert str(folder / "0 1.tar") == "https://host/a%20b/train/0%201.tar"
    assert folder.parent == remote.RemoteFolder("https://user:secret@host/a%20b", "sig=key")
    assert remote.folder_at("s3://bucket").parent is None
    pipe = remote.folder_at("pipe:aws s3 cp s3://b/{00..01}.tar - | cat")
    assert pipe.commands == {f"0{n}.tar": f"pipe:aws s3 cp s3://b/0{n}.tar - | cat" for n in (0, 1)}
    with pytest.raises(UserError, match=r"two of its commands print 0\.tar"):
        _ = remote.folder_at("pipe:cat {a,b}/0.tar").commands


def test_a_password_goes_to_its_server_alone(
    folder: Path, cache: Cache, web_server: Callable[..., Any]
) -> None:
    server = web_server(folder)
    server.password = "user:secret"
    with pytest.raises(UserError, match="no index"):
        open_source(_source(shards=server.address), text=True, cache=cache)
    written = server.address.replace("//", "//user:secret@")
    shards = open_source(_source(shards=written), text=True, cache=cache)
    assert shards.read(3) == open_folder(folder).read(3)
    assert "secret" not in str(shards.shard_location(0))


class NoCredentials(Exception):
    """What a bucket's client raises is no OSError."""


class ClosedBucket(AbstractFileSystem):
    """A bucket that answers no question."""

    protocol = "closed"

    def ls(self, path: str, detail: bool = True, **more: Any) -> list[Any]:
        raise NoCredentials("unable to locate credentials")


@pytest.mark.parametrize(
    "written", ["closed://bucket/set", "closed://bucket/set-*", "closed://bucket/0*.tar"]
)
def test_a_bucket_that_cannot_be_listed_is_said(tmp_path: Path, written: str) -> None:
    fsspec.register_implementation("closed", ClosedBucket, clobber=True)
    with pytest.raises(UserError, match=r"closed://bucket.*: it cannot be listed: NoCredentials: unable to"):
        index_remote(written, tmp_path / "index")
