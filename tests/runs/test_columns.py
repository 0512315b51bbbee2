"""Metrics as arrays hold what the merged lines hold."""

import json
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcluster.runs import files
from clipcluster.runs.columns import columns_of, merged
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics

number = st.one_of(st.integers(-5, 5), st.floats(allow_nan=True), st.none())
written = st.lists(st.lists(st.tuples(st.integers(0, 12), number), max_size=8), min_size=1, max_size=4)


@settings(max_examples=25)  # each writes files durably
@given(attempts=written)
def test_columns_are_the_merged_lines(tmp_path_factory, attempts):
    run = Run.create(Path(tmp_path_factory.mktemp("columns")) / "a", {}, {})
    for lines in attempts:
        attempt = run.claim("1", host="h", still_running=lambda job: False)
        for step, value in lines:
            attempt.metrics({"step": step, "value": value, "set/top1": 1.0})
    table = merged([columns_of(attempt) for attempt in run.attempts()])
    expected = merged_metrics(run)
    assert table["step"].tolist() == [line["step"] for line in expected]
    assert "set/top1" not in table
    if expected:
        values = [np.nan if line["value"] is None else line["value"] for line in expected]
        assert np.array_equal(table["value"], np.array(values, dtype=float), equal_nan=True)


def test_a_metric_of_some_lines_is_unknown_in_the_others(run, claim):
    attempt = claim()
    for line in (
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": "?"},
        {"step": 3, "loss": 3.0, "skipped_steps": 2},
    ):
        attempt.metrics(line)
    claim().metrics({"step": 4, "loss": 4.0, "text": "x"})
    table = merged([columns_of(one) for one in run.attempts()])
    assert np.array_equal(table["loss"], [1.0, np.nan, 3.0, 4.0], equal_nan=True)
    assert np.array_equal(table["skipped_steps"], [np.nan, np.nan, 2.0, np.nan], equal_nan=True)
    assert "text" not in table


def test_large_files_are_read_as_small_ones(tmp_path):
    good = [json.dumps({"step": step, "loss": step / 7, "name": "é😀"}) for step in range(5000)]
    odd = [
        '{"step":1,"lo',
        "",
        '{"a":NaN,"b":1e999}',
        "[1]",
        '{"x":1},{"y":2}',
        '{"t":"\\ud800"}',
        "7",
        '{"k":1,"k":2}',
    ]
    path = tmp_path / "lines.jsonl"
    for lines in (good, [*good, *odd], [*odd, *good, *odd], [*good, '{"torn":']):
        path.write_text("\n".join(lines))
        expected = []
        for text in lines:
            try:
                value = json.loads(text)
            except ValueError:
                continue
            if isinstance(value, dict):
                expected.append(value)
        assert path.stat().st_size > files._AT_ONCE
        assert repr(files.read_lines(path)) == repr(expected)
        assert repr(files.read_lines(path, last_bytes=10**9)) == repr(expected)


def test_lines_longer_than_a_chunk_and_at_its_edges(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 64)
    path = tmp_path / "lines.jsonl"
    lines = [{"step": step, "text": "x" * (step * 7 % 200)} for step in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn"')
    assert files.read_lines(path) == lines
    assert files.read_lines(tmp_path / "absent.jsonl") == []
