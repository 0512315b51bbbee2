"""Stateless randomness of the sampler: keys by name, streams by counter, permutations by sorting.

A key is BLAKE2b of what it belongs to; the numbers under it are SplitMix64 (Steele, Lea, Flood 2014,
"Fast splittable pseudorandom number generators", section 5), which has a closed form: number i of a stream
needs none before it. numpy's own shuffles may change between its versions, so a resumed run could meet
another order; hashing and sorting integers cannot.
"""

import hashlib

import numpy as np

_BLOCK = 1 << 16  # numbers made at once
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def key(*parts: int | str) -> int:
    """64-bit key of the thing that `parts` name; the same in every process, version and machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def subkeys(parent: int | np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Keys (n,) uint64 of the children `numbers` (n,) of `parent`: those numbers of its SplitMix64 stream.

    parent: one key, or (n,) uint64, one for each child.
    """
    counters = np.asarray(numbers).astype(np.uint64) + np.uint64(1)
    return _finalise(counters * _GAMMA + np.asarray(parent, dtype=np.uint64))


def permutations(keys: np.ndarray, size: int) -> np.ndarray:
    """One permutation of range(size) under each key: (n,) uint64 -> (n, size) int64.

    Sorts random words whose low bits hold the index: one plain sort, ties (likely only above 2^20 indices)
    broken by the index, so that no sorting algorithm can change the result.
    """
    low = np.uint64((1 << max(size - 1, 0).bit_length()) - 1)
    words = np.empty((len(keys), size), dtype=np.uint64)
    # block by block: temporaries as long as the whole would stay with the process after they are freed
    for first in range(0, size, _BLOCK):
        indices = np.arange(first, min(first + _BLOCK, size), dtype=np.uint64)
        block = _finalise(keys[:, None] + (indices + np.uint64(1)) * _GAMMA)
        block &= ~low
        words[:, first : first + _BLOCK] = block | indices
    words.sort(axis=-1)
    words &= low
    return words.view(np.int64)


def permutation(parent: int, size: int) -> np.ndarray:
    """The permutation of range(size) under one key, (size,) int64."""
    return permutations(np.array([parent], dtype=np.uint64), size)[0]


def _finalise(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser in place; a bijection of 64-bit words."""
    words ^= words >> np.uint64(30)
    words *= _FIRST
    words ^= words >> np.uint64(27)
    words *= _SECOND
    words ^= words >> np.uint64(31)
    return words
