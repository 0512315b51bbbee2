"""A recipe's data, opened: the sources, the order of their samples, the tokenizer, and batches of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from clipcluster.data.images.transforms import train_transform
from clipcluster.data.loading.loader import Loader
from clipcluster.data.sampling.sampler import Sampler, sampler_of
from clipcluster.data.shards.classes import check_classes, class_count
from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.open import open_source
from clipcluster.data.storage.cache import Cache
from clipcluster.data.tokenizer import Tokenizer, load_tokenizer
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.runtime.stop import Stop, Wish
from clipcluster.runtime.world import World

logger = logging.getLogger("clipcluster")
NAMED_SHARDS = 1000
"""The hashes of sources of at most this many shards are in every checkpoint, so that a refusal names one."""


@dataclass(frozen=True)
class Sources:
    """The training data: shards, the order of their samples, the tokenizer; and the run's assets."""

    shards: Sequence[Dataset]
    sampler: Sampler
    tokenizer: Tokenizer | None  # None: the task needs no captions
    assets: Path | None = None

    @property
    def samples(self) -> int:
        """The number of samples of all sources."""
        return sum(source.n_samples for source in self.shards)

    def index(self) -> list[dict[str, Any]]:
        """The sources in a checkpoint: names, fingerprints, and hashes where there are few shards."""
        return [
            {
                "name": source.name,
                "fingerprint": source.fingerprint,
                "samples": source.n_samples,
                "shards": _hashes(source),
            }
            for source in self.shards
        ]


def _hashes(source: Dataset) -> dict[str, str]:
    if len(source) > NAMED_SHARDS:
        return {}
    return {source.shard_name(number): source.sha256(number) for number in range(len(source))}


def open_sources(recipe: Recipe, assets: Path | None) -> Sources:
    """Open the recipe's sources. Raises UserError where one cannot be opened."""
    cache = Cache.of(recipe.data.cache)
    needed = TASKS[recipe.task]
    shards = [open_source(source, text=needed.captions, cache=cache) for source in recipe.data.train]
    if needed.classes:
        check_classes(class_count(recipe.model.classes, shards), shards)
    tokenizer = load_tokenizer(recipe.data.text, assets) if needed.captions else None
    return Sources(shards, sampler_of(recipe, shards), tokenizer, assets)


def check_shards(sources: Sequence[Dataset], world: World, stop: Stop) -> Wish:
    """Compare shards with their index; the ranks divide those whose content has to be hashed.

    They agree after each shard, so that none is taken for lost meanwhile. Returns STOP where a rank was asked
    to stop. Raises DataError on the rank that finds a changed shard, and on all where one is missing.
    """
    modified = world.while_main(lambda: [list(source.modified_shards().items()) for source in sources])
    found = [dict(shards) for shards in modified]
    suspects = [(source, shard) for source, shards in zip(sources, found, strict=True) for shard in shards]
    if suspects and world.is_main:
        logger.warning(
            "%d shards have a modification time that differs from their index: comparing their content "
            "(clipcluster shards index DIR avoids this for later attempts)",
            len(suspects),
        )
    wishes = Wish.NONE
    for first in range(0, len(suspects), world.size):
        for source, shard in suspects[first + world.rank : first + world.rank + 1]:
            source.check(shard)
        wishes = world.agree(stop.wishes())
        if wishes & Wish.STOP:
            return wishes
    for source, shards in zip(sources, found, strict=True):
        source.mark_unchanged(shards)  # the loader's workers need not compare what the other ranks did
    return wishes


def open_batches(
    recipe: Recipe, sources: Sources, world: World, start: int, skipped: Sequence[tuple[int, int]]
) -> Loader:
    """This rank's batches from number `start` on, without the `skipped` ranges; the caller closes them."""
    spec, prepare = TASKS[recipe.task], None
    if spec.preparation is not None:
        build = resolve_name(spec.preparation)
        prepare = build(recipe, train_transform(recipe.data.image), sources.tokenizer, sources.assets)
    return Loader(
        sources.shards,
        sources.sampler,
        recipe.data,
        tokenizer=sources.tokenizer,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.size,
        workers=recipe.data.workers,
        start=start,
        skipped=skipped,
        extras=spec.members(recipe),
        preparation=prepare,
    )
