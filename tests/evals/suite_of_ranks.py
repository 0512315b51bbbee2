"""Run by test_suite: a recipe's evaluations by several worlds of real processes.

python suite_of_ranks.py OUT SHARDS SIZE …  writes OUT/SIZE-RANK.json: results, calls of `wishes`, and how
many of them it took until a stop was noticed. The processes are forked after the imports.
"""

import datetime
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "model"))

from forked import exit_codes
from tiny_model import model_section

from clipcluster.data.tokenizer import load_tokenizer
from clipcluster.evals.suite import build_suite
from clipcluster.model.classify import build_classifier
from clipcluster.model.clip import build_clip
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.runtime.stop import Wish
from clipcluster.runtime.world import World

STOP_AT = 7


class Stopped(Exception):
    pass


def recipe(shards: Path | str, batch_size: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "ranks",
            "data": {
                "train": [{"shards": str(shards)}],
                "batch_size": 4,
                "workers": 0,
                "image": {"size": 32},
                "text": {"tokenizer": "bytes", "context_length": 48},
            },
            "model": model_section().model_dump(),
            "optim": {"lr": 0.001, "warmup": "1 steps"},
            "train": {"duration": "1 steps"},
            "evaluate": {"retrieval": [str(shards)], "zero_shot": [str(shards)], "batch_size": batch_size},
        }
    )


def classifying(shards: Path, batch_size: int) -> Recipe:
    given = recipe(shards, batch_size).model_dump()
    given["model"] = {"image": given["model"]["image"]}
    given["evaluate"] = {"classification": [str(shards)], "batch_size": batch_size}
    return Recipe.model_validate({**given, "task": "classify"})


def measure(out: Path, shards: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    if size > 1:
        store = f"file://{out}/store-{size}"
        wait = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=wait)
    world = World(rank, size, rank, torch.device("cpu"))
    settings = recipe(shards, batch_size=32)
    tokenizer = load_tokenizer(settings.data.text)
    torch.manual_seed(0)
    model = build_clip(settings, tokenizer).train()
    suite = build_suite(settings, world=world, tokenizer=tokenizer)
    calls = 0

    def wishes() -> None:
        # Only the last rank wishes to stop; all ranks learn it at the same call.
        nonlocal calls
        calls += 1
        mine = Wish.STOP if stopping and rank == size - 1 and calls >= STOP_AT else Wish.NONE
        if world.agree(mine) & Wish.STOP:
            raise Stopped

    stopping = True
    try:
        suite.run(model, wishes=wishes)
    except Stopped:
        stopped_at = calls
    stopping, calls = False, 0
    results = suite.run(model, wishes=wishes)
    settings = classifying(shards, batch_size=50)
    torch.manual_seed(0)
    classifier = build_classifier(settings, None)
    classified = build_suite(settings, world=world, tokenizer=None).run(classifier)
    report = {
        "classified": classified,
        "results": results,
        "calls": calls,
        "stopped_at": stopped_at,
        "training": model.training,
    }
    (out / f"{size}-{rank}.json").write_text(json.dumps(report))
    world.leave()


def main() -> int:
    out, shards, sizes = Path(sys.argv[1]), Path(sys.argv[2]), [int(size) for size in sys.argv[3:]]
    for size in sizes:
        if any(exit_codes(measure, [(out, shards, rank, size) for rank in range(size)])):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
