"""Words and counted nouns for messages."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most similar to `word`; None where none is similar."""
    import difflib

    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message: ``; did you mean WORD?``, or nothing where no known word is similar."""
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else ""


def shortened(value: object, limit: int = 300) -> str:
    """Any value as a text of at most `limit` characters."""
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`, `3 processes`, `1,000 entries`."""
    if number == 1:
        return f"{number} {noun}"
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{number:,} {noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{number:,} {noun[:-1]}ies"
    return f"{number:,} {noun}s"


def sized(count: float) -> str:
    """Bytes in the units of recipes and of SLURM, in which 1 GB is 1024 MB: `1.8 GB`, `640 MB`, `3 kB`."""
    for name, size in (("TB", 1 << 40), ("GB", 1 << 30), ("MB", 1 << 20)):
        if count >= size:
            return f"{count / size:.{0 if count >= 100 * size else 1}f} {name}"
    return f"{count / 1024:.0f} kB"
