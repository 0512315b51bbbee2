"""Mixing several sources: their weights as integers, and one period of draws laid out."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from clipcluster.errors import UserError

LARGEST_PERIOD = 65_536


def integer_weights(weights: Sequence[float]) -> list[int]:
    """The smallest integers in exactly the proportions of `weights`, read as the decimals they are written.

    Raises UserError where the integers' sum would exceed 65,536, naming the nearest possible weights.
    """
    # repr, because 0.1 stands for one tenth and not for the binary fraction nearest to it
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * scale) for fraction in exact]
    divisor = math.gcd(*whole)
    whole = [number // divisor for number in whole]
    if sum(whole) > LARGEST_PERIOD:
        nearest = " : ".join(str(number) for number in _nearest(exact))
        given = " : ".join(f"{weight:.12g}" for weight in weights)
        raise UserError(
            f"the weights {given} repeat only after {sum(whole):,} draws; for exact weights that period is at"
            f" most {LARGEST_PERIOD:,} draws. The nearest possible weights are {nearest}: give these as"
            " data.train.N.weight."
        )
    return whole


def lay_out(weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """One period of D = sum(weights) draws: their sources (D,) int32, and how many of each came before (D,).

    Draw j of a source with weight w falls due at (j + 1/2) / w of the period, and the draws follow each other
    as they fall due (Webster's method): the sources are spread evenly and each has exactly w of D draws.
    """
    sources = np.repeat(np.arange(len(weights), dtype=np.int32), weights)
    ordinals = np.concatenate([np.arange(weight, dtype=np.int64) for weight in weights])
    # halves of integers below 2^17: unequal quotients differ by more than a float64 rounds off
    due = (2 * ordinals + 1) / np.asarray(weights, dtype=np.float64)[sources]
    order = np.argsort(due, kind="stable")
    return sources[order], ordinals[order]


def _nearest(exact: Sequence[Fraction]) -> list[int]:
    """Integers >= 1 with a sum up to 65,536 whose fractions of it are nearest; of equals the smallest."""
    total = sum(exact)
    fractions = np.array([float(fraction / total) for fraction in exact])
    sums = np.arange(len(fractions), LARGEST_PERIOD + 1)[:, None]
    ideal = fractions * sums
    whole = np.maximum(np.floor(ideal).astype(np.int64), 1)
    missing = sums[:, 0] - whole.sum(axis=1)
    rank = np.argsort(np.argsort(whole - ideal, axis=1, kind="stable"), axis=1)
    whole += rank < missing[:, None]
    # tiny fractions rounded up to one take it from the largest
    whole[:, int(np.argmax(fractions))] += np.minimum(missing, 0)
    errors = np.abs(whole / sums - fractions).max(axis=1)
    errors[whole.min(axis=1) < 1] = np.inf
    best = whole[int(np.argmin(np.round(errors, 15)))]
    return [int(number) for number in best // math.gcd(*best.tolist())]
