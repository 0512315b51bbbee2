"""What the loader's processes hold: the same after twenty epochs as after two."""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from clipcluster.data.loading.loader import Loader
from clipcluster.data.sampling.sampler import Sampler
from clipcluster.data.shards.open import open_folder
from clipcluster.data.tokenizer import ByteTokenizer
from clipcluster.recipe.sections.data import Data
from tests.data.sources import sampler_source
from tests.shard_writer import ShardWriter

EPOCHS = 20
MEGABYTE = 2**20


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_nothing_grows_over_twenty_epochs(
    tmp_path: Path, picture: Callable[..., bytes], data_section: Callable[..., Data]
) -> None:
    with ShardWriter(tmp_path / "s", samples_per_shard=10) as writer:
        for number in range(400):
            bad, kind = number % 50 == 0, ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")[number % 6]
            side = 200 + number % 7 * 60
            image = b"<html>" if bad else picture(number, kind, (side, side + 30))
            writer.add(f"s{number:05d}", image, "jpg", [f"caption of {number}", "another"])
    shards = open_folder(tmp_path / "s")
    sampler = Sampler([sampler_source(shards.sample_counts, shards.caption_counts())], batch_size=40, seed=0)
    workers, rank = [], []
    section = data_section(batch_size=40, size=224)
    loader = Loader([shards], sampler, section, tokenizer=ByteTokenizer(77), seed=0, workers=2)
    with closing(loader):
        for _ in range(EPOCHS):
            for _ in range(10):
                assert next(loader).images.shape == (40, 3, 224, 224)
            this = psutil.Process()
            sizes = [process.memory_full_info().uss for process in this.children(recursive=True)]
            workers.append(max(sizes) / MEGABYTE)
            rank.append(this.memory_full_info().uss / MEGABYTE)
            open_files = len(os.listdir("/proc/self/fd"))
            assert open_files < 100
    print("workers", np.round(workers, 1), "rank", np.round(rank, 1))
    assert max(workers) < 400
    assert np.median(workers[-5:]) < np.median(workers[2:7]) + 15
    assert np.median(rank[-5:]) < np.median(rank[2:7]) + 15
