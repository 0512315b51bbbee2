"""Choices of captions, one or several with probabilities."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.recipe.captions import checked, checked_probabilities, field_of, probabilities_of


def test_fields_of_members() -> None:
    assert field_of("default") is field_of("txt") is field_of("captions") is field_of("json:") is None
    assert field_of("json:caption") == ("json", "caption")
    assert field_of("syn.json:a.b") == ("syn.json", "a.b")
    assert field_of("a.b.JSON:x") is None
    assert field_of("A.b.json:x:y") == ("a.b.json", "x:y")


@given(
    st.dictionaries(
        st.sampled_from(["default", "txt", "json:a", "b.json:c"]), st.floats(1e-6, 1e6), min_size=1
    )
)
def test_shares_sum_to_one_in_an_order_of_their_own(shares: dict[str, float]) -> None:
    checked_probabilities(shares)
    found = probabilities_of(shares)
    assert list(found) == sorted(shares)
    assert sum(found.values()) == pytest.approx(1)
    assert found == probabilities_of(dict(reversed(shares.items())))


def test_one_choice_has_no_probability() -> None:
    assert probabilities_of("txt") == {"txt": None}
    assert probabilities_of(None) == {None: None}


@pytest.mark.parametrize(
    "shares", [{}, {"txt": 0.0}, {"txt": float("nan")}, {"txt": float("inf")}, {"text": 1.0}]
)
def test_shares_that_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="should"):
        checked_probabilities(shares)


def test_a_known_choice_is_itself() -> None:
    assert checked("syn.json:syn_text") == "syn.json:syn_text"
