"""How a recipe names the captions of a source: one choice, or several with their probabilities.

A choice is `default` (the list `captions` of KEY.json, else KEY.txt as one caption), `lines` (the same, but
KEY.txt has one per line), `txt` (KEY.txt alone, as one caption), `json:FIELD` (a string or a list of strings
of KEY.json; dots lead into it) or `MEMBER.json:FIELD` (the same of KEY.MEMBER.json). No torch, no pydantic.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from clipcluster.text import nearest

DEFAULT, LINES, TXT = "default", "lines", "txt"
CHOICES = "default, lines, txt, json:FIELD or MEMBER.json:FIELD"
OWN = (("json", "captions"), ("json", "caption"))
"""Where KEY.json has an image's own captions (`field_of`): as the shards here, and as img2dataset its one."""

_FIELD = re.compile(r"((?P<member>[^:/]+)\.)?json:(?P<field>.+)", re.DOTALL)


@lru_cache(maxsize=256)
def field_of(choice: str) -> tuple[str, str] | None:
    """Extension of the JSON member and field within it; None for default, lines and txt."""
    match = _FIELD.fullmatch(choice)
    if match is None:
        return None
    member = match["member"]
    return (f"{member.lower()}.json" if member else "json"), match["field"]


def checked(choice: str) -> str:
    """The choice itself; ValueError, with the nearest, for an unknown one."""
    if choice in (DEFAULT, LINES, TXT) or field_of(choice) is not None:
        return choice
    near, word = nearest(choice, (DEFAULT, LINES, TXT)), choice.removesuffix(":")
    if near is None and word.isidentifier():
        near = "json:FIELD" if word == "json" else f"json:{word}"
    raise ValueError(f"should be {CHOICES}" + (f"; did you mean {near!r}?" if near else ""))


def checked_probabilities(probabilities: Mapping[str, Any]) -> None:
    """ValueError unless these are choices with positive probabilities."""
    if not probabilities:
        raise ValueError("should name at least one choice with its probability")
    for choice, probability in probabilities.items():
        try:
            checked(choice)
        except ValueError as error:
            raise ValueError(f"{choice!r} {error}") from None
        number = isinstance(probability, (int, float)) and not isinstance(probability, bool)
        if not (number and 0 < probability < math.inf):
            raise ValueError(f"{choice!r} has the probability {probability!r}; should be a positive number")


def probabilities_of(asked: str | Mapping[str, float] | None) -> dict[str | None, float | None]:
    """Choices -> probabilities that sum to 1, sorted by name: their order in a recipe is irrelevant.

    A single choice (or None: the folder's own) has the probability None: nothing is drawn.
    """
    if asked is None or isinstance(asked, str):
        return {asked: None}
    total = math.fsum(asked.values())
    return {choice: asked[choice] / total for choice in sorted(asked)}
