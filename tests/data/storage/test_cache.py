"""The cache of remote shards: bounded, least recently used first, shared by processes, no trace of a kill."""

import hashlib
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcluster.data.shards.open import open_folder
from clipcluster.data.storage import cache as module
from clipcluster.data.storage.cache import Cache, default_folder
from clipcluster.errors import UserError
from clipcluster.runtime.outcome import DataError

PROCESS = Path(__file__).with_name("fetching_process.py")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path, make_shards: Callable[..., Path]) -> Path:
    return make_shards(tmp_path / "served", 40, per_shard=4)


def start(url: str, cache: Cache, seed: int) -> "subprocess.Popen[str]":
    arguments = [url, cache.folder, str(cache.size), str(seed)]
    return subprocess.Popen(
        [sys.executable, str(PROCESS), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def expected(folder: Path) -> str:
    shards = open_folder(folder)
    read = [(position, repr(shards.read(position))) for position in range(shards.n_samples)]
    return hashlib.sha256(repr(read).encode()).hexdigest()


def held(cache: Cache) -> int:
    """Bytes in the cache's folder now; under its lock, because a listing may show a renamed file twice."""
    with cache._lock("space"):
        paths = list(Path(cache.folder).rglob("*"))
        return sum(path.stat().st_size for path in paths if path.is_file())


def largest_until(processes: "list[subprocess.Popen[str]]", cache: Cache) -> tuple[int, int]:
    """The most that the cache held while they ran, and how often it was looked at."""
    most, looks = 0, 0
    while any(process.poll() is None for process in processes):
        most, looks = max(most, held(cache)), looks + 1
        time.sleep(0.002)
    return most, looks


def test_two_ranks_fetch_a_shard_once(folder: Path, tmp_path: Path, web_server: Callable[..., Any]) -> None:
    server = web_server(folder, drop_every=5)
    cache = Cache(str(tmp_path / "cache"), 1 << 30)
    ranks = [start(server.address, cache, seed) for seed in (1, 2)]
    assert [rank.communicate()[0].strip() for rank in ranks] == [expected(folder)] * 2
    began = [path for method, path, first, _ in server.log if method == "GET" and first == 0]
    tars = [path for path in began if path.endswith(".tar")]
    assert sorted(tars) == [f"/{path.name}" for path in sorted(folder.glob("*.tar"))]
    assert len([path for path in began if path.endswith(".idx")]) == len(tars)
    assert began.count("/index.bin") == 1


def test_a_bound_that_holds_three_of_ten_shards(
    folder: Path, tmp_path: Path, web_server: Callable[..., Any]
) -> None:
    server = web_server(folder, drop_every=5)
    biggest = max(path.stat().st_size for path in folder.glob("*.tar"))
    lists = (folder / "index.bin").stat().st_size
    cache = Cache(str(tmp_path / "cache"), 3 * biggest + lists + 5000)
    ranks = [start(server.address, cache, seed) for seed in (1, 2, 3)]
    most, looks = largest_until(ranks, cache)
    assert [rank.communicate()[0].strip() for rank in ranks] == [expected(folder)] * 3
    assert 2 * biggest < most <= cache.size
    assert looks > 20
    fetched = [path for _, path, *_ in server.log if path.endswith(".tar")]
    assert len(fetched) > 20, "some came back again and again"


def test_a_kill_leaves_no_lock_and_no_half_file(
    folder: Path, tmp_path: Path, web_server: Callable[..., Any]
) -> None:
    server = web_server(folder)
    server.stalled.clear()
    cache = Cache(str(tmp_path / "cache"), 1 << 30)
    victim = start(server.address, cache, 1)
    root = Path(cache.folder)
    deadline = time.monotonic() + 30
    while not [part for part in root.glob("*.tar.*.part") if part.stat().st_blocks]:
        assert victim.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    assert not list(root.glob("*.tar"))
    assert list(root.glob("*.part"))
    server.stalled.set()
    other = start(server.address, cache, 1)
    assert other.communicate(timeout=60)[0].strip() == expected(folder)
    assert len(list(root.glob("*.tar"))) == 10
    assert not list(root.glob("*.part"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, str]]:
    """Address, size and hash of eight files of 1 to 8 kB."""
    folder, made = tmp_path_factory.mktemp("pieces"), []
    for number in range(8):
        data = os.urandom(1000 * (number + 1))
        (folder / f"{number}.tar").write_bytes(data)
        made.append((f"file://{folder}/{number}.tar", len(data), hashlib.sha256(data).hexdigest()))
    return made


@pytest.fixture
def fresh() -> Iterator[Callable[[int], Cache]]:
    folders: list[str] = []

    def make(size: int) -> Cache:
        folders.append(tempfile.mkdtemp())
        return Cache(folders[-1], size)

    yield make
    for folder in folders:
        shutil.rmtree(folder)


@settings(max_examples=40)
@given(uses=st.lists(st.integers(0, 7), min_size=1, max_size=30), bound=st.integers(8000, 40000))
def test_what_was_used_longest_ago_goes_first(
    pieces: list[tuple[str, int, str]], uses: list[int], bound: int
) -> None:
    folder = tempfile.mkdtemp()
    try:
        cache, order = Cache(folder, bound), []
        for number in uses:
            address, size, digest = pieces[number]
            fd = cache.shard(address, size, digest)
            assert hashlib.sha256(os.pread(fd, size + 1, 0)).hexdigest() == digest
            os.close(fd)
            missing = number not in order
            order = [*(other for other in order if other != number), number]
            while missing and sum(pieces[other][1] for other in order) > bound:
                order.pop(0)
            present = {path.stem for path in Path(folder).glob("*.tar")}
            assert present == {pieces[other][2] for other in order}
    finally:
        shutil.rmtree(folder)


def test_what_is_open_goes_last_and_stays_readable(
    pieces: list[tuple[str, int, str]], fresh: Callable[[int], Cache]
) -> None:
    cache = fresh(12_000)
    kept = cache.shard(*pieces[3])
    os.close(cache.shard(*pieces[4]))
    os.close(cache.shard(*pieces[5]))  # 4 kB in use and 5 kB unused were there: the unused go
    assert {path.stem for path in Path(cache.folder).glob("*.tar")} == {pieces[3][2], pieces[5][2]}
    os.close(cache.shard(*pieces[7]))  # 4 + 8 kB fit
    os.close(cache.shard(*pieces[6]))
    last = cache.shard(*pieces[7])
    more = cache.shard(*pieces[6])  # nothing else is left to go
    assert held(cache) <= 12_000
    for fd, (_, size, digest) in ((kept, pieces[3]), (last, pieces[7]), (more, pieces[6])):
        assert hashlib.sha256(os.pread(fd, size, 0)).hexdigest() == digest
        os.close(fd)


def test_what_cannot_be_kept(
    pieces: list[tuple[str, int, str]], fresh: Callable[[int], Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = fresh(5000)
    with pytest.raises(DataError, match=r"7\.tar|8,000 bytes and the cache holds 5,000"):
        cache.shard(*pieces[7])
    lists = Path(cache.folder) / "lists" / "x"
    lists.mkdir(parents=True)
    (lists / "index.bin").write_bytes(bytes(3000))
    with pytest.raises(OSError, match=r"no space for 3,000 bytes .*1,000 more are needed"):
        cache.shard(*pieces[2])
    os.utime(lists / "index.bin", (1, 1))  # nobody opened it for long
    os.close(cache.shard(*pieces[2]))
    assert not lists.exists()
    assert not list(Path(cache.folder).glob("*.part"))
    full = os.statvfs_result((4096, 4096, 1000, 10, 10, 0, 0, 0, 0, 255))
    monkeypatch.setattr(module.os, "statvfs", lambda path: full)
    os.close(cache.shard(*pieces[1]))  # 41 kB free, all of them left alone: the other one goes
    assert [path.stem for path in Path(cache.folder).glob("*.tar")] == [pieces[1][2]]


def test_folders_that_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NODE_DISK", str(tmp_path))
    assert Cache("$NODE_DISK/cache").root == tmp_path / "cache"
    with pytest.raises(UserError, match=r"data\.cache\.folder '\$NOT_SET/cache'"):
        _ = Cache("$NOT_SET/cache").root
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made at"):
        _ = Cache(str(tmp_path / "file" / "cache")).root
    monkeypatch.setenv("CLIPCLUSTER_CACHE", "/some/where")
    assert default_folder() == "/some/where"
    monkeypatch.delenv("CLIPCLUSTER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == "~/.cache/clipcluster"


def test_an_index_in_use_is_not_evicted_by_its_age(
    folder: Path, tmp_path: Path, web_server: Callable[..., Any]
) -> None:
    """A run of more than `LIST_DAYS` starts workers that map the index again, from the same folder."""
    server = web_server(folder)
    cache = Cache(str(tmp_path / "cache"), 1 << 30)
    dataset = open_folder(server.address, cache=cache)
    (table,) = Path(cache.folder).glob("lists/*/index.bin")

    def look_for_room(number: int) -> None:
        old = time.time() - 86400 * (module.LIST_DAYS + 1)
        os.utime(table, (old, old))
        fd, _ = cache.unnamed(f"{server.address}/0000{number}.tar")
        os.close(fd)

    sent = pickle.dumps(dataset)
    look_for_room(0)
    worker = pickle.loads(sent)
    assert worker.read(0) == open_folder(folder).read(0)
    del dataset
    look_for_room(1)
    assert table.stat().st_mtime > time.time() - 60, "the worker has it: it is used now"
    del worker
    look_for_room(2)
    assert not table.parent.exists()
    assert open_folder(server.address, cache=cache).read(0).key == "s00000"


def test_processes_of_two_machines_may_have_one_number(
    folder: Path, tmp_path: Path, web_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the module stands for a machine: its process has this one's number, and begins to count."""
    address, machines = f"{web_server(folder).address}/00000.tar", []
    for _ in range(2):
        assert module.__spec__ is not None
        machines.append(importlib.util.module_from_spec(module.__spec__))
        module.__spec__.loader.exec_module(machines[-1])  # type: ignore[union-attr]
    here, there = (machine.Cache(str(tmp_path / "cache")) for machine in machines)

    def both(*given: Any, **more: Any) -> Any:
        os.close(there.unnamed(address)[0])
        return module.download(*given, **more)

    monkeypatch.setattr(machines[0], "download", both)
    fd, got = here.unnamed(address)
    assert os.fstat(fd).st_size == got.size == (folder / "00000.tar").stat().st_size
    os.close(fd)


def test_a_list_whose_folder_is_evicted_while_it_is_fetched_gets_another(
    folder: Path, tmp_path: Path, web_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder may be an old one of the same content: the eviction does not know what is on its way."""
    cache = Cache(str(tmp_path / "cache"), 1 << 30)

    def evicts(*about: object) -> None:
        for place in Path(cache.folder).glob("lists/*"):
            shutil.rmtree(place)

    monkeypatch.setattr(module, "read_beside", evicts)
    assert open_folder(web_server(folder).address, cache=cache).n_samples == 40
