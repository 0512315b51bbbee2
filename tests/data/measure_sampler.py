"""Measures what the sampler costs: `python tests/data/measure_sampler.py`. Prints JSON, a line a case.

In processor time, for a start or resume (making it, the first batch) and for each batch that follows;
and the memory of the process. For a source of 12.8 million samples and one of 12.8 billion in 1.28 million
shards; each plain, with every sample three times a pass, and (12.8 million) with other repeats for some of
1,000 classes. What an index maps and processes share (counts, ends) is made beforehand and is not counted.
"""

import json
import statistics
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from clipcluster.data.sampling.oversampling import Repeats
from clipcluster.data.sampling.sampler import Sampler
from tests.data.sources import sampler_source

BATCH, STEP, BATCHES = 384, 12_345, 100
PER_SHARD = 10_000


def measured(make: Callable[[], Sampler], repetitions: int) -> dict[str, float]:
    """Medians of milliseconds, and the private memory that a sampler keeps and the most it takes, in MB."""
    plan, first, following = [], [], []
    for repetition in range(repetitions):
        began = time.process_time()
        sampler = make()
        planned = time.process_time()
        sampler.batch(STEP + repetition)
        resumed = time.process_time()
        for step in range(BATCHES):
            sampler.batch(STEP + repetition + 1 + step)
        done = time.process_time()
        plan.append(planned - began)
        first.append(resumed - planned)
        following.append((done - resumed) / BATCHES)
    del sampler
    tracemalloc.start()
    sampler = make()
    sampler.batch(STEP)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    milliseconds = (("plan_ms", plan), ("first_batch_ms", first), ("batch_ms", following))
    return {
        **{name: round(1000 * statistics.median(values), 3) for name, values in milliseconds},
        "kept_mb": round(kept / 1e6, 1),
        "peak_mb": round(peak / 1e6, 1),
    }


def samplers(shards: int, by_class: bool) -> dict[str, Callable[[], Sampler]]:
    """Ways to make a sampler of one source, whose columns are those of an index."""
    counts = np.full(shards, PER_SHARD, np.int64)
    more_than = counts.astype(np.int32)[None]
    samples = shards * PER_SHARD
    captions = np.broadcast_to(np.uint8(1), (samples,))

    def make(repeats: Repeats | None) -> Callable[[], Sampler]:
        source = sampler_source(counts, captions, repeats=repeats, more_than=more_than)
        return lambda: Sampler([source], batch_size=BATCH, seed=0, captions="random")

    made = {"plain": make(None), "three_times": make(Repeats(3))}
    if by_class:
        classes = np.random.default_rng(0).integers(0, 1000, samples, dtype=np.int32)
        made["by_class"] = make(Repeats(1, {number: 1 + number % 4 for number in range(100)}, classes))
    return made


if __name__ == "__main__":
    for shards, repetitions in ((1_280, 9), (1_280_000, 3)):
        for name, make in samplers(shards, shards < 10_000).items():
            about = {"samples": shards * PER_SHARD, "shards": shards, "repeats": name}
            print(json.dumps({**about, **measured(make, repetitions)}))
