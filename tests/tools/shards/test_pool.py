"""A decoder that crashes or hangs costs one sample: for real, in processes."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.open import open_folder
from tests.shard_writer import ShardWriter
from tools.shards.pool import PoolError, over_shards


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("pool_tasks")


@pytest.fixture
def shards(tmp_path: Path) -> Dataset:
    with ShardWriter(tmp_path / "s", samples_per_shard=3) as writer:
        for number, name in enumerate(["a", "crash", "b", "c", "hang", "crash", "d"]):
            writer.add_members(f"{name}{number}", {"jpg": b"x" * number})
    return open_folder(tmp_path / "s")


def test_one_sample_is_lost_where_a_process_crashes_or_hangs(tasks: ModuleType, shards: Dataset) -> None:
    seen: list[tuple[int, int]] = []
    found = over_shards(
        tasks.lengths, shards, workers=2, patience=1.5, progress=lambda *both: seen.append(both)
    )
    crashed = "the decoder crashed (SIGSEGV)"
    assert found == [[0, crashed, 2], [3, "the decoder took longer than 2 s", crashed], [6]]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_what_a_task_raises_is_raised(tasks: ModuleType, shards: Dataset) -> None:
    for workers in (0, 1):
        with pytest.raises(OSError, match="the disk under shard 0 fails"):
            over_shards(tasks.refuses, shards, workers=workers)


def test_a_death_outside_of_a_sample_is_no_bad_sample(tasks: ModuleType, shards: Dataset) -> None:
    with pytest.raises(PoolError, match=r"00000\.tar exited with code 3"):
        over_shards(tasks.dies, shards, workers=1)


def test_a_sample_that_kills_although_it_is_left_out_ends_the_work(
    tasks: ModuleType, shards: Dataset
) -> None:
    with pytest.raises(PoolError, match=r"00000\.tar crashed \(SIGSEGV\); check memory"):
        over_shards(tasks.dies_twice, shards, workers=1)
