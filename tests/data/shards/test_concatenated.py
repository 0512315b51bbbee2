"""Columns laid end to end behave as the one array they stand for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.data.shards.concatenated import Concatenated

PIECES = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(0, 99)), min_size=1, max_size=4)


@given(PIECES, st.data())
def test_as_numpy(shapes: list[tuple[int, int, int]], data: st.DataObject) -> None:
    pieces = [
        [np.random.default_rng(seed + i).integers(0, 256, size).astype(np.uint8) for i in range(columns)]
        for size, columns, seed in shapes
    ]
    whole = np.concatenate([np.sum(piece, axis=0, dtype=np.int32) for piece in pieces])
    joined = Concatenated(pieces)
    assert len(joined) == len(whole)
    start, stop = data.draw(st.integers(-12, 25)), data.draw(st.integers(-12, 25))
    np.testing.assert_array_equal(joined[start:stop], whole[start:stop])
    np.testing.assert_array_equal(np.asarray(joined), whole)
    if len(whole):
        numbers = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=8)), np.int64)
        np.testing.assert_array_equal(joined[numbers], whole[numbers])
        assert joined[int(len(whole) - 1)] == whole[-1]
    with pytest.raises(IndexError):
        joined[len(whole)]


def test_one_kind_of_number_is_kept() -> None:
    assert Concatenated([[np.zeros(2, np.uint8)], [np.zeros(1, np.uint8)]]).dtype == np.uint8
    assert Concatenated([[np.zeros(2, np.uint8)], [np.zeros(1, np.int32)]])[:].dtype == np.int32
    assert Concatenated([[np.full(2, 200, np.uint8), np.full(2, 100, np.uint8)]])[1] == 300
