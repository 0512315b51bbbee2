"""How fast remote shards come into the cache: python -m tests.data.measure_cache [SHARDS] [MEGABYTES]."""

import functools
import http.server
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from clipcluster.data.shards.open import open_folder
from clipcluster.data.storage.cache import Cache
from clipcluster.runs.files import file_sha256
from tests.shard_writer import ShardWriter


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files; says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def main(shards: int = 8, megabytes: int = 100) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, image = Path(place) / "set", os.urandom(110_000)
        each = megabytes * 1_000_000 // len(image)
        with ShardWriter(folder, samples_per_shard=each) as writer:
            for number in range(shards * each):
                writer.add(f"s{number:07d}", image, "jpg", ["a caption"])
        handler = functools.partial(Quiet, directory=place)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        began = time.perf_counter()
        for path in sorted(folder.glob("*.tar")):
            file_sha256(path)
        hashing = time.perf_counter() - began
        at = f"http://127.0.0.1:{server.server_address[1]}/set"
        source = open_folder(at, cache=Cache(f"{place}/cache"))
        for what in ("fetched one by one", "opened again"):
            began = time.perf_counter()
            for shard in range(shards):
                source.read(shard * each)
            seconds = time.perf_counter() - began
            print(
                f"{what}: {1000 * seconds / shards:,.1f} ms a shard, {shards * megabytes / seconds:,.0f} MB/s"
            )
            source.close()
        source = open_folder(at, cache=Cache(f"{place}/another"))
        began = time.perf_counter()
        source.announce(shard * each for shard in range(shards))
        print(f"fetched four at once: {shards * megabytes / (time.perf_counter() - began):,.0f} MB/s")
        print(f"sha256 alone, from the disk: {shards * megabytes / hashing:,.0f} MB/s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
