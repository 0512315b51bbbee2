"""Columns that are written aside and mapped."""

from pathlib import Path

import numpy as np
import pytest

from clipcluster.data.shards.columns import BrokenColumns, read_columns, write_columns


def test_round_trip_keeps_types_shapes_and_meta(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(5, dtype=np.int64),
        "empty": np.zeros((0, 32), np.uint8),
        "b": np.arange(6, dtype=np.uint8).reshape(2, 3),
    }
    write_columns(tmp_path / "c", {"name": "é", "n": 1}, arrays)
    meta, read = read_columns(tmp_path / "c")
    assert meta == {"name": "é", "n": 1}
    assert not read["a"].flags.writeable
    assert not read["a"].flags.owndata
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("keep", [0, 10, 40, 200])
def test_a_cut_file_is_refused(tmp_path: Path, keep: int) -> None:
    write_columns(tmp_path / "c", {}, {"a": np.arange(100)})
    data = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(data[:keep])
    with pytest.raises(BrokenColumns):
        read_columns(tmp_path / "c")
