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


def texts(kind: int, data: bytes, choice: str) -> list[str]:
    """The captions in a member of this kind (JSON or TXT)."""
    return from_json(data, choice) if kind == JSON else from_txt(data, choice)


def from_json(data: bytes, choice: str) -> list[str]:
    """The captions in a JSON member; none if it is unreadable or has none."""
    return from_record(record_of(data), choice)


def record_of(data: bytes) -> Any:
    """A JSON member parsed; None if it cannot be."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def from_record(record: Any, choice: str) -> list[str]:
    """The captions in a parsed JSON member."""
    field = field_of(choice)
    if field is None:
        value = record.get("captions") if isinstance(record, dict) else None
    else:
        value = _inside(record, field[1])
        if isinstance(value, str):
            value = [value]
    return [text for text in value if _is_caption(text)] if isinstance(value, list) else []


def from_txt(data: bytes, choice: str) -> list[str]:
    """The captions in a txt member; none if its bytes are not UTF-8."""
    if field_of(choice) is not None:
        return []
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return []
    pieces = text.splitlines() if choice == LINES else [text]
    return [piece for piece in pieces if piece.strip()]


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
