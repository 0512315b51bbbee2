"""Numbers in sentences."""


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`, `3 processes`, `1,000 entries`."""
    if number == 1:
        return f"{number} {noun}"
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{number:,} {noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{number:,} {noun[:-1]}ies"
    return f"{number:,} {noun}s"
