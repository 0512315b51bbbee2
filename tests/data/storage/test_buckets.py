"""Shards in a bucket, behind a real S3 server on this machine that breaks every fifth transfer."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from clipcluster.data.loading.stream import webdataset
from clipcluster.data.shards.open import open_folder, open_source
from clipcluster.data.storage.cache import Cache
from clipcluster.errors import UserError
from clipcluster.recipe.sections.data import Source
from tools.shards.index import index_folders

pytest.importorskip("s3fs")
pytest.importorskip("moto.moto_server.werkzeug_app")

PROCESS = Path(__file__).with_name("fetching_process.py")
ROOT = Path(__file__).resolve().parents[3]


class Breaking:
    """Passes requests on, notes them, and ends every fifth body of a tar in its middle."""

    def __init__(self, application: Any) -> None:
        self.application, self.log, self.bodies = application, [], 0
        self.counting = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.log.append((method, path))
        answer = self.application(environ, start_response)
        if method != "GET" or not path.endswith(".tar"):
            return answer
        with self.counting:
            self.bodies += 1
            broken = self.bodies % 5 == 0
        data = b"".join(answer)
        return self._half(data) if broken else [data]

    @staticmethod
    def _half(data: bytes) -> Iterator[bytes]:
        yield data[: len(data) // 2]
        raise ConnectionAbortedError("on purpose")


@pytest.fixture(scope="module")
def s3() -> Iterator[Breaking]:
    """A running server; the environment points its clients to it."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *args: object) -> None:
            pass

    application = Breaking(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield application
    server.shutdown()


@pytest.fixture
def folder(tmp_path: Path, make_shards: Callable[..., Path]) -> Path:
    return make_shards(tmp_path / "train", 40, per_shard=4)


def put(folder: Path, bucket: str, *suffixes: str) -> None:
    import s3fs

    system = s3fs.S3FileSystem()
    system.mkdir(bucket)
    for path in folder.iterdir():
        if path.suffix in suffixes:
            system.put_file(str(path), f"{bucket}/set/train/{path.name}")


def test_two_ranks_fetch_a_bucket_once_through_breaks(s3: Breaking, folder: Path, tmp_path: Path) -> None:
    put(folder, "whole", ".tar", ".idx", ".bin")
    s3.log.clear()
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                str(PROCESS),
                "s3://whole/set/train",
                str(tmp_path / "cache"),
                "1000000000",
                str(seed),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for seed in (1, 2)
    ]
    local = open_folder(folder)
    read = [(position, repr(local.read(position))) for position in range(40)]
    digest = hashlib.sha256(repr(read).encode()).hexdigest()
    assert [rank.communicate()[0].strip() for rank in ranks] == [digest, digest]
    tars = [path for method, path in s3.log if method == "GET" and path.endswith(".tar")]
    assert len(set(tars)) == 10
    assert len(tars) == 12  # two of them were broken off


@pytest.mark.long
def test_a_loop_of_ones_own_over_a_bucket(s3: Breaking, folder: Path, tmp_path: Path) -> None:
    put(folder, "loop", ".tar")
    local = open_folder(folder)
    known = {local.read(position).key: local.read(position).captions for position in range(40)}
    for shards in ("s3://loop/set/train", "s3://loop/set/train/0000*.tar"):
        stream = webdataset(shards, cache=tmp_path / "cache")
        found = list(DataLoader(stream, batch_size=None, num_workers=2))
        assert sorted(sample["__key__"] for sample in found) == sorted(known)
        assert all(sample["captions"] == known[sample["__key__"]] for sample in found)
        assert {sample["__url__"] for sample in found} == {
            f"s3://loop/set/train/{n:05d}.tar" for n in range(10)
        }


def test_an_index_on_this_machine_and_a_glob(
    s3: Breaking, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPCLUSTER_CACHE", str(tmp_path / "of the user"))
    put(folder, "bare", ".tar")
    cache = Cache(str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"s3://bare/set/train: these shards have no index"):
        open_source(Source(shards="s3://bare/set/train"), text=True, cache=cache)
    (made,) = index_folders(["s3://bare/set/train"], index=tmp_path / "index")
    assert (made.shards, made.samples) == (10, 40)
    s3.log.clear()
    assert index_folders(["s3://bare/set/train"], index=tmp_path / "index") == [made]
    assert not [path for method, path in s3.log if method == "GET" and path.endswith(".tar")]
    for written, count in (("s3://bare/s*/train", 10), ("s3://bare/set/train/0000[1-4].tar", 4)):
        source = Source(shards=written, index=str(tmp_path / "index"))
        shards = open_source(source, text=True, cache=cache)
        assert len(shards) == count
        assert shards.modified_shards() == {}
    local = open_folder(folder)
    assert [shards.read(i) for i in range(16)] == [local.read(i + 4) for i in range(16)]
    with pytest.raises(UserError, match="nothing matches"):
        open_source(Source(shards="s3://bare/nothing*/train"), text=True, cache=cache)
