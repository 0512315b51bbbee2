"""Singular and plural."""

import pytest

from clipcluster.text import counted


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "rank", "0 ranks"),
        (1, "rank", "1 rank"),
        (1000, "sample", "1,000 samples"),
        (2, "process", "2 processes"),
        (3, "entry", "3 entries"),
        (3, "key", "3 keys"),
    ],
)
def test_counted(number, noun, text):
    assert counted(number, noun) == text
