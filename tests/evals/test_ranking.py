"""The place of the right candidate against the definition, spelled out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcluster.evals.ranking import Matches, figures, first_match


def matches(right: list[list[int]]) -> Matches:
    pairs = [(query, candidate) for query, own in enumerate(right) for candidate in own]
    return Matches(*np.array(pairs[::-1]).T)


@st.composite
def questions(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    """Whole-number scores, so that ties abound, and for every query the right candidates."""
    candidates = draw(st.integers(1, 7))
    row = st.lists(st.integers(-2, 2), min_size=candidates, max_size=candidates)
    right = st.lists(st.integers(0, candidates - 1), min_size=1, max_size=candidates, unique=True)
    queries = draw(st.integers(1, 5))
    return (
        draw(st.lists(row, min_size=queries, max_size=queries)),
        draw(st.lists(right, min_size=queries, max_size=queries)),
    )


@given(questions())
def test_the_place_is_that_in_the_sorted_list(question: tuple[list[list[int]], list[list[int]]]) -> None:
    scores, right = question
    candidates = len(scores[0])
    found = first_match(
        torch.tensor(scores, dtype=torch.float32),
        matches(right).mask(0, len(scores), candidates, torch.device("cpu")),
    )
    for query, own in enumerate(right):
        order = sorted(range(candidates), key=lambda candidate: (-scores[query][candidate], candidate))
        assert found[query] == min(order.index(candidate) for candidate in own)


@given(questions(), st.data())
def test_any_piece_of_the_owners_is_that_piece_of_the_mask(
    question: tuple[list[list[int]], list[list[int]]], data: st.DataObject
) -> None:
    scores, right = question
    start = data.draw(st.integers(0, len(right)))
    stop = data.draw(st.integers(start, len(right)))
    mask = matches(right).mask(start, stop, len(scores[0]), torch.device("cpu"))
    assert [row.nonzero().flatten().tolist() for row in mask] == [sorted(own) for own in right[start:stop]]


def test_differences_of_rounding_are_ties() -> None:
    scores = torch.tensor([[0.5, 0.5 + 5e-7, 0.5 - 5e-7]])
    for own in range(3):
        right = torch.zeros(1, 3, dtype=torch.bool)
        right[0, own] = True
        assert first_match(scores, right) == own


def test_what_is_not_a_number_comes_last() -> None:
    nan = float("nan")
    scores = torch.tensor([[0.5, nan, 0.1], [nan, nan, nan], [nan, 0.9, 0.8]])
    right = torch.tensor([[False, True, False], [False, False, True], [True, False, True]])
    assert first_match(scores, right).tolist() == [2, 2, 1]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_figures_are_those_of_openclip(places: list[int]) -> None:
    found = dict(figures(np.array(places)))
    for cut in (1, 5, 10):
        assert found[f"r{cut}"] == pytest.approx(sum(place < cut for place in places) / len(places))
    assert found["mean_rank"] == pytest.approx(sum(places) / len(places) + 1)
    assert found["median_rank"] == np.floor(np.median(places)) + 1
