"""Which checkpoints stay."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clipcluster.recipe.sections.checkpoint import Best, Keep
from clipcluster.train.rotation import kept, smaller_is_better

steps = st.sets(st.integers(0, 500), max_size=30)


@given(steps, st.integers(2, 5), st.one_of(st.none(), st.integers(1, 50)))
def test_the_newest_always_stay_and_nothing_is_made_up(found: set[int], last: int, every: int | None) -> None:
    chosen = kept(Keep(last=last), every, found, {}, ())
    assert chosen <= found
    assert set(sorted(found)[-last:]) <= chosen
    assert chosen - set(sorted(found)[-last:]) == {
        step for step in sorted(found)[:-last] if every and step and step % every == 0
    }


@given(steps, st.dictionaries(st.integers(0, 500), st.floats(0, 1)), st.integers(1, 3))
def test_the_best_stay(found: set[int], measured: dict[int, float], count: int) -> None:
    values = {step: value for step, value in measured.items() if step in found}
    chosen = kept(Keep(last=2, best=Best(metric="val/t2i_r1", count=count)), None, found, values, ())
    gone = values.keys() - chosen
    if gone and len(values) >= count:
        best = sorted((values[step] for step in values.keys() & chosen), reverse=True)[:count]
        assert max(values[step] for step in gone) <= min(best)
        assert len(best) == count


def test_of_ranks_the_smallest_is_best() -> None:
    keep = Keep(last=2, best=Best(metric="val/t2i_mean_rank"))
    assert kept(keep, None, [1, 2, 3, 4, 5], {1: 3.0, 2: 1.5, 3: 9.0}, ()) == {2, 4, 5}
    assert smaller_is_better("val/i2t_median_rank")
    assert not smaller_is_better("val/zero_shot_top1")


def test_a_pinned_one_stays() -> None:
    assert kept(Keep(last=2), None, [1, 2, 3, 4], {}, [1]) == {1, 3, 4}
