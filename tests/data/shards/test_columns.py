"""Columns that are written aside and mapped; what is read may be anybody's file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipcluster.data.shards.columns import MAGIC, BrokenColumns, read_columns, write_columns


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


def crafted(path: Path, header: Any, body: bytes = bytes(4096)) -> Path:
    """A file with this header, which may be bytes, in front of `body`."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = MAGIC + len(data).to_bytes(8, "little") + data
    path.write_bytes(start + bytes(-len(start) % 64) + body)
    return path


COLUMN = {"dtype": "<i8", "shape": [4], "offset": 0}


@pytest.mark.parametrize(
    "column",
    [
        *({**COLUMN, "dtype": dtype} for dtype in ("|O", "O", "<f8", "|V8", "<U2", "<M8[s]", "i8,O", "?",
                                                   ">i8", "<i16", "", 8, None, ["<i8"], [["a", "|O"]])),
        *({**COLUMN, "shape": shape} for shape in ([-1], [-4, -1], [1 << 62], [1 << 31, 1 << 33], [4.0],
                                                   [True], ["4"], 4, None, {}, [0, 1 << 62], [1, 1, 1],
                                                   [])),
        *({**COLUMN, "offset": offset} for offset in (-64, 1 << 62, 4096, 1, 0.0, None, "0", False)),
        *({k: v for k, v in COLUMN.items() if k != name} for name in COLUMN),
        None, 3, "a", [],
    ],
    ids=str,
)  # fmt: skip
def test_a_crafted_column_is_refused(tmp_path: Path, column: Any) -> None:
    """A header names no objects, no bytes beyond the file's, and nothing but plain numbers."""
    good = crafted(tmp_path / "good", {"meta": {}, "columns": {"a": COLUMN}})
    assert read_columns(good).arrays["a"].tolist() == [0, 0, 0, 0]
    with pytest.raises(BrokenColumns):
        read_columns(crafted(tmp_path / "bad", {"meta": {}, "columns": {"a": column}}))


@pytest.mark.parametrize(
    "header",
    [[], 3, None, {}, {"meta": {}}, {"columns": {}}, {"meta": [], "columns": {}}, {"meta": {}, "columns": []},
     b"{", b"\xff\xfe", b"[" * 100_000, b'{"meta": {}, "columns": {"a": {"offset": NaN}}}', b"1" * 5000],
    ids=lambda header: str(header)[:40],
)  # fmt: skip
def test_a_crafted_header_is_refused(tmp_path: Path, header: Any) -> None:
    with pytest.raises(BrokenColumns):
        read_columns(crafted(tmp_path / "bad", header))
