"""Run by test_suite: a recipe's evaluations by several worlds of real processes.

python suite_of_ranks.py OUT SHARDS SIZE …  writes OUT/SIZE-RANK.json: results, calls of `tick`, and how
many of them it took until a stop was noticed. The processes are forked after the imports.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sklearn.linear_model
import sklearn.neighbors  # noqa: F401  (both loaded once for all ranks, before they are forked)
import torch

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "model"))

from forked import run_worlds, world_over_gloo
from tiny_model import model_section

from clipcluster.data.tokenizer import load_tokenizer
from clipcluster.evals.loss import loss_of_groups
from clipcluster.evals.ranking import Pairs, rank_pairs
from clipcluster.evals.retrieval import figures_of
from clipcluster.evals.suite import build_suite
from clipcluster.model.classify import build_classifier
from clipcluster.model.clip import build_clip
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.runtime.stop import Wish
from clipcluster.runtime.world import World

STOP_AT = 7


class Stopped(Exception):
    pass


def recipe(shards: Path | str, batch_size: int, **more: Any) -> Recipe:
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
            "evaluate": {
                "retrieval": [str(shards)],
                "zero_shot": [str(shards)],
                "batch_size": batch_size,
                **more,
            },
        }
    )


def classifying(shards: Path, batch_size: int) -> Recipe:
    given = recipe(shards, batch_size).model_dump()
    given["model"] = {"image": given["model"]["image"]}
    given["evaluate"] = {"classification": [str(shards)], "batch_size": batch_size}
    return Recipe.model_validate({**given, "task": "classify"})


def of_features(world: World) -> dict[str, float]:
    """Retrieval and loss on random features with ties, the same on every rank; 2,345 scores at a time."""
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (300, 900))
    texts[600:] = texts[:300]  # copies, of other images
    images[250:] = images[:50]
    pairs = Pairs(torch.arange(900) // 3, torch.arange(900))
    places = rank_pairs(images, texts, pairs, world, lambda: None, 2345)
    model = SimpleNamespace(logit_scale=torch.tensor([2.0]), logit_bias=None)
    loss = loss_of_groups(model, images, texts[::3], world, lambda: None, 64)
    return {**figures_of(places), "loss": loss}


def measure(out: Path, rank: int, size: int, shards: Path) -> None:
    with world_over_gloo(out, rank, size) as world:
        probe = {"train": str(shards), "test": str(shards)}
        settings = recipe(shards, batch_size=32, probe=[probe])
        tokenizer = load_tokenizer(settings.data.text)
        torch.manual_seed(0)
        model = build_clip(settings, tokenizer).train()
        suite = build_suite(settings, world=world, tokenizer=tokenizer)
        calls = 0

        def tick() -> None:
            # Only the last rank wishes to stop; all ranks learn it at the same call.
            nonlocal calls
            calls += 1
            mine = Wish.STOP if stopping and rank == size - 1 and calls >= STOP_AT else Wish.NONE
            if world.agree(mine) & Wish.STOP:
                raise Stopped

        stopping = True
        try:
            suite.run(model, tick=tick)
        except Stopped:
            stopped_at = calls
        stopping, calls = False, 0
        measured = suite.run(model, tick=tick)
        settings = classifying(shards, batch_size=50)
        torch.manual_seed(0)
        classifier = build_classifier(settings, None)
        classified = build_suite(settings, world=world, tokenizer=None).run(classifier)
        report = {
            "classified": vars(classified),
            "measured": vars(measured),
            "of_features": of_features(world),
            "calls": calls,
            "stopped_at": stopped_at,
            "training": model.training,
        }
        (out / f"{size}-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    out, shards, *sizes = sys.argv[1:]
    sys.exit(run_worlds(measure, Path(out), [int(size) for size in sizes], Path(shards)))
