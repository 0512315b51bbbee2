"""Which texts of a sample are its captions: one rule, used by the index and by the reader.

A choice is `default` (the JSON's `captions` if it is a list, else `txt` as one caption), `lines` (the same,
but `txt` is split by lines) or `json:FIELD` (a string, or a list of strings, of that JSON field).
"""

import json
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError

DEFAULT = "default"
LINES = "lines"
_FIELD = "json:"


def check_choice(choice: str) -> str:
    """Returns the choice; UserError if there is no such one."""
    if choice in (DEFAULT, LINES) or (choice.startswith(_FIELD) and len(choice) > len(_FIELD)):
        return choice
    raise UserError(
        f"captions {choice!r}: no such choice; there are default (the JSON's captions, else txt as one "
        "caption), lines (txt split by lines) and json:FIELD"
    )


def choice_for(folder: Path, asked: str | None) -> str:
    """The choice in force for a folder of shards: the one asked for, else what `dataset_type.txt` says."""
    if asked is not None:
        return check_choice(asked)
    for place in (folder, folder.parent):
        kind = place / "dataset_type.txt"
        if kind.is_file():
            return LINES if kind.read_text(encoding="utf-8").strip() == "retrieval" else DEFAULT
    return DEFAULT


def from_json(data: bytes, choice: str) -> list[str]:
    """The captions that a JSON member gives; an unreadable one, or one without them, gives none."""
    try:
        record = json.loads(data)
    except ValueError:
        return []
    value: Any = None
    if isinstance(record, dict):
        value = record.get(choice[len(_FIELD) :] if choice.startswith(_FIELD) else "captions")
    if isinstance(value, str) and choice.startswith(_FIELD):
        value = [value]
    return (
        [text for text in value if isinstance(text, str) and text.strip()] if isinstance(value, list) else []
    )


def from_txt(data: bytes, choice: str) -> list[str]:
    """The captions that a txt member gives; bytes that are not UTF-8 give none."""
    if choice.startswith(_FIELD):
        return []
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return []
    texts = text.splitlines() if choice == LINES else [text]
    return [text for text in texts if text.strip()]
