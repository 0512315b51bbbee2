"""The place of the correct candidate in a ranking of features, in bounded memory.

Ties go to the candidate that comes first, as in OpenCLIP 4.2, and scores closer than TIE are ties: so copies
of one image have a fixed order, and a model that gives everything the same vector scores as chance does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from clipcluster.evals.features import Context, Tick, rank_chunks

TIE = 1e-6
"""Cosines closer than this are equal: what float32 products of the same vectors differ by."""

CHUNK_ELEMENTS = 1 << 24
"""Scores held at once (64 MiB of float32)."""

CUTS = (1, 5, 10)
_LAST = -1e30  # below every score, and equal to itself


class Matches:
    """Pairs of a query and a correct candidate, (pairs,) int64 each; every query is in at least one."""

    def __init__(self, queries: np.ndarray, candidates: np.ndarray) -> None:
        order = np.argsort(queries, kind="stable")
        self._queries, self._candidates = (
            torch.from_numpy(queries[order]),
            torch.from_numpy(candidates[order]),
        )

    def mask(self, start: int, stop: int, candidates: int, device: torch.device) -> Tensor:
        """(stop - start, candidates) bool: true where the candidate is correct for the query."""
        first, last = torch.searchsorted(self._queries, torch.tensor([start, stop])).tolist()
        mask = torch.zeros(stop - start, candidates, dtype=torch.bool, device=device)
        rows, columns = self._queries[first:last] - start, self._candidates[first:last]
        mask[rows.to(device), columns.to(device)] = True
        return mask


def cosines(queries: Tensor, candidates: Tensor) -> Tensor:
    """(Q, E) and (C, E), normalised -> (Q, C), in the features' own precision, autocast or not."""
    with torch.autocast(queries.device.type, enabled=False):
        return queries @ candidates.T


def first_match(scores: Tensor, right: Tensor) -> Tensor:
    """The place, from 0, of the best-placed correct candidate of every query.

    scores: (Q, C) float, the higher the better. right: (Q, C) bool, at least one true a row.
    Candidates are ranked by falling score, ties (within TIE) by rising number, NaN last.
    Returns (Q,) int64.
    """
    scores = scores.nan_to_num(nan=_LAST)
    best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
    tied = (scores - best).abs() <= TIE
    own = (tied & right).to(torch.uint8).argmax(dim=1, keepdim=True)
    earlier = torch.arange(scores.shape[1], device=scores.device) < own
    return ((scores > best + TIE) | (tied & earlier)).sum(dim=1)


def rank_together(
    queries: Tensor, candidates: Tensor, owners: Matches, context: Context, tick: Tick
) -> np.ndarray:
    """(Q,) int64: the place, from 0, of every query's best correct candidate; the ranks share the queries."""
    places = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for start, stop in rank_chunks(len(queries), context.world, max(1, CHUNK_ELEMENTS // len(candidates))):
        if start < stop:
            right = owners.mask(start, stop, len(candidates), queries.device)
            places[start:stop] = first_match(cosines(queries[start:stop], candidates), right)
        tick()
    return context.world.all_reduce_sum(places).cpu().numpy()


def figures(places: np.ndarray) -> Iterator[tuple[str, float]]:
    """R@1, R@5, R@10 as fractions, the mean rank, and as median rank OpenCLIP's floor(median) + 1.

    places: (Q,) int, from 0; ranks count from 1.
    """
    for cut in CUTS:
        yield f"r{cut}", float(np.mean(places < cut))
    yield "mean_rank", float(np.mean(places)) + 1
    yield "median_rank", float(math.floor(np.median(places)) + 1)
