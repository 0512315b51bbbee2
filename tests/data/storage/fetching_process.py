"""One process that reads a remote source in an order of its own: URL CACHE BYTES SEED; prints a hash."""

import hashlib
import random
import sys
from types import SimpleNamespace

from clipcluster.data.shards.open import open_source
from clipcluster.data.storage.cache import Cache


def main(url: str, folder: str, size: str, seed: str) -> None:
    source = SimpleNamespace(shards=url, index=None, captions_in=None)
    shards = open_source(source, text=True, cache=Cache(folder, int(size)))
    positions = list(range(shards.n_samples))
    random.Random(int(seed)).shuffle(positions)
    shards.announce(positions[:12])
    read = sorted((position, repr(shards.read(position))) for position in positions)
    print(hashlib.sha256(repr(read).encode()).hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
