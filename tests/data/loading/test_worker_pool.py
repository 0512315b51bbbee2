"""The loader's processes: they outlive signals, not their rank, and are gone when closed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clipcluster.data.loading.loader import Loader
from clipcluster.data.loading.worker_pool import WorkerDied
from clipcluster.data.sampling.sampler import Sampler
from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.open import open_folder
from clipcluster.data.tokenizer import ByteTokenizer
from clipcluster.recipe.sections.data import Data
from clipcluster.runtime.world import is_lost_peer
from tests.data.sources import sampler_source


@pytest.fixture
def shards(tmp_path: Path, make_shards: Callable[..., Path]) -> Dataset:
    return open_folder(make_shards(tmp_path / "s", 40, per_shard=10))


@pytest.fixture
def loader(shards: Dataset, data_section: Callable[..., Data]) -> Loader:
    sampler = Sampler(
        [sampler_source(shards.sample_counts, shards.caption_counts(), None)],
        batch_size=8,
        seed=0,
        captions="first",
        lanes=4,
        window=8,
        full_shuffle_below=10,
        epoch_samples=None,
    )
    return Loader([shards], sampler, data_section(), tokenizer=ByteTokenizer(16), seed=0, workers=2)


def pids(loader: Loader) -> list[int]:
    return [worker.pid for worker in loader._pool._results._workers]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def take(loader: Loader, count: int) -> None:
    for _ in range(count):
        next(loader)


def gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(map(running, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(running, pids))


def test_close_is_quick_and_may_be_repeated(loader: Loader) -> None:
    next(loader)
    workers = pids(loader)
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 1
    assert gone(workers, 1)
    loader.close()


def test_a_loader_never_used_closes(loader: Loader) -> None:
    loader.close()


def test_workers_are_deaf_to_the_signals_of_their_rank(loader: Loader) -> None:
    first = next(loader).index
    workers = pids(loader)
    server = int(Path(f"/proc/{workers[0]}/stat").read_text().rpartition(")")[2].split()[1])
    assert server != os.getpid()
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"):
        for pid in (*workers, server):
            os.kill(pid, getattr(signal, name))
    assert [next(loader).index for _ in range(8)] == list(range(first + 1, first + 9))
    assert all(map(running, (*workers, server)))
    loader.close()


def test_a_killed_worker_is_named(loader: Loader) -> None:
    next(loader)
    victim = pids(loader)[1]
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=str(victim)):
        take(loader, 20)


def test_a_dead_worker_is_not_taken_for_a_lost_rank() -> None:
    error = WorkerDied("loader worker 7 was killed or crashed: [Errno 104] Connection reset by peer")
    error.__cause__ = ConnectionResetError(104, "Connection reset by peer")
    assert not is_lost_peer(error)


def test_workers_end_with_a_rank_that_is_killed(shards: Dataset, tmp_path: Path) -> None:
    code = f"""
        import time
        from multiprocessing import active_children

        import torch

        from clipcluster.data.loading.loader import evaluation_batches
        from clipcluster.data.shards.open import open_folder
        from clipcluster.recipe.sections.data import Data
        from clipcluster.runtime.world import World

        if __name__ == "__main__":
            section = Data(train=[{{"shards": "x"}}], batch_size=8, image={{"size": 8}})
            shards = open_folder({str(shards.folders[0].folder)!r})
            world = World(0, 1, 0, torch.device("cpu"))
            batches = evaluation_batches(shards, section, world=world, batch_size=4, workers=2)
            next(batches)
            print(*[worker.pid for worker in active_children()], flush=True)
            time.sleep(60)
    """
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(code))
    rank = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert rank.stdout is not None
        workers = [int(pid) for pid in rank.stdout.readline().split()]
        assert len(workers) == 2
        assert all(map(running, workers))
    finally:
        rank.kill()
        rank.wait()
    assert gone(workers, 5)
