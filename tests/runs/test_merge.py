"""Reading all attempts as one run."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from clipcluster.runs import merge
from clipcluster.runs.folder import Run
from tests.consumed import merged_samples


def test_the_highest_attempt_wins_and_in_it_the_later_line(run, claim):
    first = claim()
    for step in (10, 20, 30):
        first.metrics({"step": step, "loss": 1.0})
    second = claim()
    for step, loss in ((20, 2.0), (30, 2.5), (30, 3.0), (40, 4.0)):
        second.metrics({"step": step, "loss": loss})
    merged = merge.merged_metrics(run)
    assert [(line["step"], line["loss"], line["attempt"]) for line in merged] == [
        (10, 1.0, 1),
        (20, 2.0, 2),
        (30, 3.0, 2),
        (40, 4.0, 2),
    ]


def test_a_torn_line_changes_nothing(run, claim):
    first = claim()
    first.metrics({"step": 10, "loss": 1.0})
    second = claim()
    with (second.path / "metrics.jsonl").open("w") as stream:
        stream.write('{"step": 10, "loss": 2.')
    assert [line["loss"] for line in merge.merged_metrics(run)] == [1.0]


def test_a_run_without_attempts_has_nothing(run):
    assert merge.merged_metrics(run) == []
    assert merge.events(run) == []
    assert merge.bad_samples(run) == []
    assert merged_samples(run) == []


def test_events_by_attempt_then_time(run, claim):
    first = claim()
    first.event("start", writer="rank-1")
    first.event("start", writer="rank-0")
    claim().event("start", writer="rank-0")
    with (first.path / "events-batch.jsonl").open("w") as stream:
        stream.write('{"event":"early","attempt":1,"time":0}\n')
    assert [(line["attempt"], line["event"]) for line in merge.events(run)] == [
        (1, "early"),
        (1, "start"),
        (1, "start"),
        (2, "start"),
    ]


def test_bad_samples_are_counted_once(run, claim):
    first = claim()
    first.bad_sample(0, "0.tar", "a", "truncated", step=3)
    first.bad_sample(1, "0.tar", "b", "empty")
    claim().bad_sample(1, "0.tar", "a", "truncated again")
    assert [(line["key"], line["reason"]) for line in merge.bad_samples(run)] == [
        ("a", "truncated"),
        ("b", "empty"),
    ]


def test_samples_of_a_step_belong_to_one_attempt(run, claim):
    first = claim()
    first.samples(0, [{"step": 1, "slot": 0, "shard": "s", "key": "a"}])
    first.samples(1, [{"step": 1, "slot": 1, "shard": "s", "key": "b"}])
    first.samples(0, [{"step": 2, "slot": 0, "shard": "s", "key": "c"}])
    first.samples(1, [{"step": 2, "slot": 1, "shard": "s", "key": "d"}])
    second = claim()  # on one rank, from step 2 on
    second.samples(0, [{"step": 2, "slot": slot, "shard": "s", "key": key} for slot, key in enumerate("cd")])
    assert [(line["step"], line["slot"], line["key"], line["attempt"]) for line in merged_samples(run)] == [
        (1, 0, "a", 1),
        (1, 1, "b", 1),
        (2, 0, "c", 2),
        (2, 1, "d", 2),
    ]


written = st.lists(st.lists(st.tuples(st.integers(0, 12), st.integers()), max_size=8), min_size=1, max_size=4)


@given(attempts=written)
def test_merging_is_the_last_writer_of_each_step(tmp_path_factory, attempts):
    run = Run.create(Path(tmp_path_factory.mktemp("merge")) / "a", {}, {})
    expected = {}
    for lines in attempts:
        attempt = run.claim("1", host="h", still_running=lambda job: False)
        for step, value in lines:
            attempt.metrics({"step": step, "value": value})
            expected[step] = (value, attempt.number)
    merged = {line["step"]: (line["value"], line["attempt"]) for line in merge.merged_metrics(run)}
    assert merged == expected
    assert list(merged) == sorted(expected)
