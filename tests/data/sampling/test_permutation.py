import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcluster.data.sampling.permutation import key, permutation, permutations, subkeys

words = st.integers(0, 2**64 - 1)


def test_streams_are_the_published_splitmix64():
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert subkeys(1234567, np.arange(5)).tolist() == expected


def test_keys_never_change():
    assert key(0, 1, "shards") == 15603013395896550306
    assert permutation(key(0, 1, "shards"), 10).tolist() == [1, 2, 6, 8, 0, 3, 7, 5, 9, 4]


@settings(deadline=None)
@given(words, st.integers(0, 3000))
def test_a_permutation_holds_every_index_once(parent, size):
    assert np.array_equal(np.sort(permutation(parent, size)), np.arange(size))


@settings(deadline=None)
@given(words, st.integers(1, 6), st.integers(0, 40))
def test_many_permutations_at_once_are_those_under_each_key(parent, rows, size):
    keys = subkeys(parent, np.arange(rows))
    expected = [permutation(int(one), size) for one in keys]
    assert np.array_equal(permutations(keys, size), expected)


@settings(deadline=None)
@given(words, st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_a_subkey_depends_on_its_number_alone(parent, numbers):
    together = subkeys(parent, np.array(numbers))
    assert together.tolist() == [int(subkeys(parent, np.array([one]))[0]) for one in numbers]


def test_every_permutation_of_four_is_equally_likely():
    rows = permutations(subkeys(key("a test"), np.arange(24_000)), 4)
    _, counts = np.unique(rows, axis=0, return_counts=True)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert len(counts) == math.factorial(4)
    assert chi_square < 50  # 23 degrees of freedom: above 49.7 once in 1,000 keys


def test_where_an_index_lands_depends_neither_on_it_nor_on_its_neighbour():
    size = 512
    rows = permutations(subkeys(key("another test"), np.arange(400)), size)
    same_order = np.mean(rows[:, 1:] > rows[:, :-1])
    assert abs(same_order - 0.5) < 0.01
    assert abs(rows[:, 0].mean() / size - 0.5) < 0.05
