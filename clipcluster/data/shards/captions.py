"""Which texts of a sample are its captions: one rule, used by the index and by the reader.

The choices are those of `clipcluster.recipe.captions`. A caption is a text with something in it besides
spaces; bytes that are not UTF-8, broken JSON and lone surrogates give none.
"""

import json
from pathlib import Path
from typing import Any

from clipcluster.data.shards.texts import DATASET_TYPE
from clipcluster.errors import UserError
from clipcluster.recipe.captions import DEFAULT, LINES, checked, field_of
from clipcluster.recipe.captions import TXT as TXT_ALONE

NO_TEXT, JSON, TXT = 0, 1, 2  # the kind of member a sample's captions come from


def check_choice(choice: str) -> str:
    """Returns the choice; UserError if there is no such one."""
    try:
        return checked(choice)
    except ValueError as error:
        raise UserError(f"captions {choice!r}: no such choice; it {error}") from None


def choice_for(folder: Path, asked: str | None) -> str:
    """The choice in force for a folder of shards: the one asked for, else what `dataset_type.txt` says."""
    if asked is not None:
        return check_choice(asked)
    for place in (folder, folder.parent):
        kind = place / DATASET_TYPE
        if kind.is_file():
            return LINES if kind.read_text(encoding="utf-8").strip() == "retrieval" else DEFAULT
    return DEFAULT


def members_of(choice: str) -> tuple[tuple[int, str], ...]:
    """Kind and extension of the members to look into, in order; the first with captions is used."""
    if choice == TXT_ALONE:
        return ((TXT, "txt"),)
    field = field_of(choice)
    return ((JSON, "json"), (TXT, "txt")) if field is None else ((JSON, field[0]),)


def parsed(kind: int, data: bytes) -> Any:
    """What a member of this kind says: JSON parsed, txt as text; None if it cannot be read."""
    try:
        return json.loads(data) if kind == JSON else data.decode("utf-8")
    except (ValueError, RecursionError):
        return None


def texts(kind: int, content: Any, choice: str) -> list[str]:
    """The captions in a member of this kind, which is `parsed`."""
    field = field_of(choice)
    if kind == TXT:
        found = (content or "").splitlines() if choice == LINES else [content]
    elif field is None:
        found = content.get("captions") if isinstance(content, dict) else None
    else:
        found = _inside(content, field[1])
        found = [found] if isinstance(found, str) else found
    return [text for text in found if _is_caption(text)] if isinstance(found, list) else []


def _inside(record: Any, field: str) -> Any:
    """The field of that very name, else the one that its dots lead to; None if there is none."""
    if isinstance(record, dict) and field in record:
        return record[field]
    for name in field.split("."):
        if not isinstance(record, dict) or name not in record:
            return None
        record = record[name]
    return record


def _is_caption(text: Any) -> bool:
    if not isinstance(text, str) or not text.strip():
        return False
    if text.isascii():
        return True
    try:
        text.encode()  # half of a surrogate pair, which JSON can write and no tokenizer can read
    except UnicodeEncodeError:
        return False
    return True
