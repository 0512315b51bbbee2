"""The place of the correct candidate in a ranking of features, in bounded memory.

Ties go to the candidate that comes first, as in OpenCLIP 4.2, and scores closer than TIE are ties: so copies
of one image have a fixed order, and a model that gives everything the same vector scores as chance does.
Scores are sums without rounding (`exact`), so that places depend neither on how they are cut into chunks nor
on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipcluster.evals.features import Tick, rank_chunks
from clipcluster.runtime.world import World

TIE = 1e-6
"""Scores closer than this are equal: what features of the same image or text differ by."""

CHUNK_ELEMENTS = 1 << 22
"""Scores held at once (32 MiB of float64)."""

CUTS = (1, 5, 10)
_LAST = -1e30  # below every score, and equal to itself
_UNIT = 2.0**-25
_PAIRS = 1 << 13  # whose scores are computed at once


def exact(features: Tensor) -> Tensor:
    """(n, E) of length at most two -> float64, rounded to multiples of 2**-25 (3e-8).

    A product of two such vectors has no rounding errors, in any order of summation: its terms are multiples
    of 2**-50, and their sums stay below 2**3 (Cauchy and Schwarz), which the 53 bits of float64 hold.
    """
    return (features.double() / _UNIT).round() * _UNIT


def scores_of(queries: Tensor, candidates: Tensor) -> Tensor:
    """(Q, E) and (C, E), both `exact` -> (Q, C) float64; NaN becomes a number below all others."""
    with torch.autocast(queries.device.type, enabled=False):
        return (queries @ candidates.T).nan_to_num_(nan=_LAST)


def places_of(scores: Tensor, own: Tensor) -> Tensor:
    """The place, from 0, of candidate `own` (Q,) of every query; (Q,) int64.

    scores: (Q, C) float, the higher the better. Candidates are ranked by falling score, ties (within TIE) by
    rising number, NaN last.
    """
    scores = scores.double().nan_to_num(nan=_LAST)
    best = scores.gather(1, own[:, None])
    numbers = torch.arange(scores.shape[1], device=scores.device)
    return _ahead(scores, numbers, best, own[:, None]).sum(dim=1)


def _ahead(scores: Tensor, numbers: Tensor, best: Tensor, own: Tensor) -> Tensor:
    """Which candidates stand before number `own`, whose score is `best`: better ones, and earlier equals."""
    return torch.where(numbers < own, scores >= best - TIE, scores > best + TIE)


@dataclass(frozen=True)
class Pairs:
    """What belongs together: row r of an image and of a text, (P,) int64 each, images in rising order."""

    images: Tensor
    texts: Tensor

    def scores(self, images: Tensor, texts: Tensor) -> np.ndarray:
        """(P,) float64: the score of each pair; images (n, E) and texts (m, E) are `exact`."""
        parts = zip(self.images.split(_PAIRS), self.texts.split(_PAIRS), strict=True)
        scores = [torch.einsum("pe,pe->p", images[own], texts[other]) for own, other in parts]
        return torch.cat(scores).nan_to_num(nan=_LAST).cpu().numpy()


class _Places:
    """The place of every query's best correct candidate, counted while scores come in chunks."""

    def __init__(self, queries: Tensor, candidates: Tensor, scores: np.ndarray, count: int) -> None:
        of, to = queries.cpu().numpy(), candidates.cpu().numpy()
        best = np.full(count, _LAST)
        np.maximum.at(best, of, scores)
        near = scores >= best[of] - TIE
        first = np.full(count, np.iinfo(np.int64).max)
        np.minimum.at(first, of[near], to[near])
        self._best, self._own = (torch.from_numpy(column).to(queries.device) for column in (best, first))
        self._places = torch.zeros(count, dtype=torch.int64, device=queries.device)

    def add_queries(self, scores: Tensor, start: int, stop: int) -> None:
        """Count for queries `start` to `stop` all candidates; scores (stop - start, C)."""
        numbers = torch.arange(scores.shape[1], device=scores.device)
        best, own = self._best[start:stop, None], self._own[start:stop, None]
        self._places[start:stop] += _ahead(scores, numbers, best, own).sum(dim=1)

    def add_candidates(self, scores: Tensor, start: int, stop: int) -> None:
        """Count for all queries candidates `start` to `stop`; scores (stop - start, Q)."""
        numbers = torch.arange(start, stop, device=scores.device)[:, None]
        self._places += _ahead(scores, numbers, self._best, self._own).sum(dim=0)

    def of_all(self, world: World) -> np.ndarray:
        """(queries,) int64, from 0, counted over all ranks; meaningless for a query in no pair."""
        return world.all_reduce_sum(self._places).cpu().numpy()


def rank_both_ways(
    rows: Callable[[int, int], Tensor],
    pairs: Pairs,
    scores: np.ndarray,
    shape: tuple[int, int],
    world: World,
    tick: Tick,
    elements: int = CHUNK_ELEMENTS,
) -> tuple[np.ndarray, np.ndarray]:
    """The places, from 0, of every image's best correct text and of every text's best correct image.

    rows(start, stop): the scores of these images with all texts, (stop - start, texts) float64. pairs: the
    correct ones, with their `scores` (P,). shape: how many images and texts there are. elements: scores held
    at once. The ranks share the images. Returns (images,) and (texts,) int64, of those in no pair without
    meaning. Collective.
    """
    of_images = _Places(pairs.images, pairs.texts, scores, shape[0])
    of_texts = _Places(pairs.texts, pairs.images, scores, shape[1])
    for start, stop in rank_chunks(shape[0], world, max(1, elements // shape[1])):
        if start < stop:
            chunk = rows(start, stop)
            of_images.add_queries(chunk, start, stop)
            of_texts.add_candidates(chunk, start, stop)
        tick()
    return of_images.of_all(world), of_texts.of_all(world)


def rank_pairs(
    images: Tensor, texts: Tensor, pairs: Pairs, world: World, tick: Tick, elements: int = CHUNK_ELEMENTS
) -> dict[str, np.ndarray]:
    """The places, from 0, of both conventions (`clipcluster.evals.retrieval`), by direction.

    images (n, E) and texts (m, E), of length one. `i2t` (n,): of each image's best caption, without meaning
    for an image in no pair; `t2i` (m,): of each text's best image; `paired_i2t`, `paired_t2i` (P,): of
    row r among the rows of `pairs`. Every text is in a pair. Memory grows with n + m + P and `elements`, not
    with their products. Collective.
    """
    images, texts = exact(images), exact(texts)
    scores = pairs.scores(images, texts)
    every = torch.arange(len(scores), device=images.device)

    def paired_rows(start: int, stop: int) -> Tensor:
        own = pairs.images[start:stop]
        first, last = int(own[0]), int(own[-1])
        return scores_of(images[first : last + 1], texts)[:, pairs.texts][own - first]

    grouped = rank_both_ways(
        lambda start, stop: scores_of(images[start:stop], texts),
        pairs,
        scores,
        (len(images), len(texts)),
        world,
        tick,
        elements,
    )
    shape = (len(scores), len(scores))
    paired = rank_both_ways(paired_rows, Pairs(every, every), scores, shape, world, tick, elements)
    names = ("i2t", "t2i", "paired_i2t", "paired_t2i")
    return dict(zip(names, (*grouped, *paired), strict=True))


def best_of(scores: Tensor, count: int) -> Tensor:
    """The numbers of every query's `count` best candidates, (Q, at most count): equals in their order."""
    grid = (scores / TIE).round()
    return grid.argsort(dim=1, descending=True, stable=True)[:, :count]


def figures(places: np.ndarray) -> Iterator[tuple[str, float]]:
    """R@1, R@5, R@10 as fractions, the mean rank, and as median rank OpenCLIP's floor(median) + 1.

    places: (Q,) int, from 0; ranks count from 1.
    """
    for cut in CUTS:
        yield f"r{cut}", float(np.mean(places < cut))
    yield "mean_rank", float(np.mean(places)) + 1
    yield "median_rank", float(math.floor(np.median(places)) + 1)
