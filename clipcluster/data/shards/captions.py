"""The texts of shards: which of a sample's are its captions, for the index and for the reader, and those
beside the shards: names of classes, templates of prompts, and which captions there are.

The choices are those of `clipcluster.recipe.captions`. A caption is a text with something in it besides
spaces; bytes that are not UTF-8, broken JSON and lone surrogates give none.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.recipe.captions import DEFAULT, LINES, checked, field_of
from clipcluster.recipe.captions import TXT as TXT_ALONE

NO_TEXT, JSON, TXT = 0, 1, 2  # the kind of member a sample's captions come from

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DATASET_TYPE = "dataset_type.txt"
BESIDE_SHARDS = (DATASET_TYPE, CLASS_NAMES, TEMPLATES)


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


@lru_cache(maxsize=256)
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
    return [text for _, text in numbered(kind, content, choice)]


def numbered(kind: int, content: Any, choice: str) -> list[tuple[int, str]]:
    """The same, each with its number in the member: of all texts there, also those that are no caption."""
    field = field_of(choice)
    if kind == TXT:
        found = (content or "").splitlines() if choice == LINES else [content]
    elif field is None:
        found = content.get("captions") if isinstance(content, dict) else None
    else:
        found = _inside(content, field[1])
        found = [found] if isinstance(found, str) else found
    found = found if isinstance(found, list) else []
    return [(number, text) for number, text in enumerate(found) if _is_caption(text)]


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


def class_names(data: bytes, where: object) -> list[str]:
    """The names of classes 0, 1, …: one per line, so that a line's place is its class's number.

    Empty lines at the end are none. UserError, naming the line: an empty one before a name, which no prompt
    can be made of and without which all later classes would get another's name; bytes that are not UTF-8.
    """
    names = _lines(data, where)
    while names and not names[-1].strip():
        names.pop()
    for number, name in enumerate(names):
        if not name.strip():
            raise UserError(
                f"{where}: line {number + 1} is empty, and would be the name of class {number}; write the "
                "name there (line N + 1 names class N), or remove the line if it names no class"
            )
    return names


def templates(data: bytes, where: object) -> list[str]:
    """The templates of prompts, one per line, without empty lines. UserError: bytes that are not UTF-8."""
    return [line for line in _lines(data, where) if line.strip()]


def _lines(data: bytes, where: object) -> list[str]:
    """Lines as editors count them, by line feeds alone: Unicode has other breaks."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"not UTF-8 text ({error.reason} at byte {error.start}); give a file of UTF-8 lines"
        raise UserError(f"{where}: {wrong}") from None
    return [line.removesuffix("\r") for line in text.split("\n")]
