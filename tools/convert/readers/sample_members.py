"""What the members of a sample say: image, captions, fields, class, uid; for shards that others wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tools.convert.readers import uids
from tools.convert.readers.tar_samples import image_of
from tools.convert.records import BadRecord, Record


def record_of(key: str, members: dict[str, bytes], caption_field: str | None = None) -> Record:
    """A sample of image, txt, json and cls; other members stay members. BadRecord if one cannot be read.

    Captions are the json's `caption_field` if one is named; else its `captions` if that is a list, else txt,
    else what the json says under `caption`.
    """
    rest = dict(members)
    extension = image_of(members)
    if extension is None:
        raise BadRecord(key, "no image")
    image = rest.pop(extension)
    fields = _fields(key, rest.pop("json", b"{}"))
    texts = _captions(key, fields, rest.pop("txt", b""), caption_field)
    cls = rest.pop("cls", b"").strip()
    return Record(
        key,
        image,
        texts,
        {name: value for name, value in fields.items() if name != "captions"},
        int(cls) if cls.isdigit() else None,
        rest,
    )


def _fields(key: str, data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise BadRecord(key, "its json cannot be read") from None
    if not isinstance(fields, dict):
        raise BadRecord(key, "its json is not an object")
    return fields


def _captions(key: str, fields: dict[str, Any], txt: bytes, field: str | None) -> list[str]:
    value = fields.get(field or "captions")
    if field is None and not isinstance(value, list):
        try:
            value = txt.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRecord(key, "its txt is not UTF-8") from None
        value = value if value.strip() else fields.get("caption")
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]


def uid_of(key: str, read_json: Callable[[], bytes] | None) -> bytes | None:
    """The uid of a sample: the json's, else the key (without the `-j` of a repeat) if it is one."""
    if read_json is not None:
        try:
            fields = json.loads(read_json())
        except (ValueError, RecursionError):
            fields = None
        if isinstance(fields, dict) and "uid" in fields:
            return uids.from_hex(fields["uid"])
    name = key.rpartition("/")[2]
    return uids.from_hex(name[:32]) if len(name) == 32 or name[32:33] == "-" else None
