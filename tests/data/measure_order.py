"""Measures what a resume costs the order of samples: `python tests/data/measure_order.py`. Prints JSON."""

import json
import statistics
import time

import numpy as np

from clipcluster.data.order import Order, SourceShape

BATCH, STEP, REPETITIONS = 384, 12_345, 9


def milliseconds(shards: int, per_shard: int, captions: int) -> dict[str, float]:
    """Medians for one source: making the plan, the first batch after a resume, each batch that follows."""
    counts = np.full(shards, per_shard, np.int64)
    of_samples = np.full(shards * per_shard, captions, np.uint8)
    plan, first, following = [], [], []
    for repetition in range(REPETITIONS):
        began = time.perf_counter()
        order = Order([SourceShape(counts, of_samples)], batch_size=BATCH, seed=0, captions="random")
        planned = time.perf_counter()
        order.batch(STEP + repetition)
        resumed = time.perf_counter()
        for step in range(100):
            order.batch(STEP + repetition + 1 + step)
        done = time.perf_counter()
        plan.append(planned - began)
        first.append(resumed - planned)
        following.append((done - resumed) / 100)
    return {
        name: round(1000 * statistics.median(values), 3)
        for name, values in (("plan_ms", plan), ("first_batch_ms", first), ("batch_ms", following))
    }


if __name__ == "__main__":
    print(json.dumps({"samples": 12_800_000, "shards": 1_280, **milliseconds(1_280, 10_000, 1)}, indent=2))
