"""The plan of a soak: the same for the same seed, and nothing in it that could not be done."""

from hypothesis import given
from hypothesis import strategies as st

from tests.soak.plan import CANCELLED, OFTEN, RUNS, acts, cases

SEEDS = st.integers(0, 2**63)


@given(SEEDS, st.floats(300, 3600))
def test_a_plan_is_a_function_of_its_seed(seed, seconds):
    plan = acts(seed, seconds)
    assert plan == acts(seed, seconds)
    assert plan != acts(seed + 1, seconds)
    assert plan == sorted(plan, key=lambda act: act.at)
    assert all(0 <= act.at <= seconds and 0 <= act.draw < 1 for act in plan)
    assert [act.run for act in plan if act.kind == "submit"] == list(range(RUNS))
    assert [act.run for act in plan if act.kind == "cancel for good"] == [CANCELLED]


@given(SEEDS)
def test_one_node_at_most_is_missing_and_what_is_cancelled_is_submitted_again(seed):
    plan = acts(seed, 1800)
    missing = 0
    for act in plan:
        missing += (act.kind in ("kill a node", "lose a node")) - (act.kind == "restore")
        assert missing in (0, 1)
    assert missing == 0
    cancelled = sum(act.kind in ("cancel", "scancel") for act in plan)
    assert sum(act.kind == "submit again" for act in plan) >= cancelled


def test_half_an_hour_has_every_act():
    for seed in range(20):
        assert {act.kind for act in acts(seed, 1800)} == {"submit", "restore", "cancel for good", *OFTEN}


def test_the_runs_have_every_shape_and_fate():
    found = cases(1800)
    assert [case.number for case in found] == list(range(RUNS))
    assert {case.ranks for case in found if case.torch} == {2, 3, 4}, (
        "two ranks never differ in the last bits"
    )
    assert [case.fate for case in found].count("finish") == RUNS - 2
