"""Which texts are captions."""

import json
from pathlib import Path

import pytest

from clipcluster.data.shards.captions import (
    JSON,
    TXT,
    check_choice,
    choice_for,
    members_of,
    parsed,
    texts,
)
from clipcluster.errors import UserError


def _from_json(data: bytes, choice: str) -> list[str]:
    return texts(JSON, parsed(JSON, data), choice)


def _from_txt(data: bytes, choice: str) -> list[str]:
    return texts(TXT, parsed(TXT, data), choice)


@pytest.mark.parametrize(
    ("record", "choice", "found"),
    [
        ({"captions": ["a", "b"]}, "default", ["a", "b"]),
        ({"captions": ["a", " ", 3, "b"]}, "lines", ["a", "b"]),
        ({"captions": "a"}, "default", []),
        ({"caption": "a"}, "default", []),
        ({"caption": "a\nb"}, "json:caption", ["a\nb"]),
        ({"caption": ["a", "b"], "captions": ["c"]}, "json:caption", ["a", "b"]),
        ({"caption": None}, "json:caption", []),
        (["captions"], "default", []),
        ({"syn_text": ["a", "b"]}, "syn.json:syn_text", ["a", "b"]),
        ({"blip": {"captions": ["a"]}}, "json:blip.captions", ["a"]),
        ({"blip.captions": "b", "blip": {"captions": ["a"]}}, "json:blip.captions", ["b"]),
        ({"blip": "a"}, "json:blip.captions", []),
        ({"caption": ["half a \ud83d", "é"]}, "json:caption", ["é"]),
    ],
)
def test_json(record: object, choice: str, found: list[str]) -> None:
    assert _from_json(json.dumps(record).encode(), choice) == found


def test_broken_json_gives_none() -> None:
    assert _from_json(b'{"captions": ["a"', "default") == []
    assert _from_json(b"\xff\xfe\x00", "default") == []
    assert _from_json(b"[" * 100_000, "default") == []
    assert _from_json(b'{"captions": [' + b"9" * 10_000 + b"]}", "default") == []


def test_txt_is_one_caption_or_lines() -> None:
    assert _from_txt(b"one\ntwo\n", "default") == ["one\ntwo\n"]
    assert _from_txt(b"one\n\n two\n", "lines") == ["one", " two"]
    assert _from_txt(b"one\ntwo\n", "txt") == ["one\ntwo\n"]
    assert _from_txt(b" \n", "default") == []
    assert _from_txt(b"caf\xe9", "default") == []


def test_retrieval_folders_split_lines(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert choice_for(tmp_path / "train", None) == "default"
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    assert choice_for(tmp_path / "train", None) == "lines"
    assert choice_for(tmp_path / "train", "json:x") == "json:x"


def test_where_captions_are_looked_for() -> None:
    assert members_of("default") == members_of("lines") == ((JSON, "json"), (TXT, "txt"))
    assert members_of("txt") == ((TXT, "txt"),)
    assert members_of("json:a.b:c") == ((JSON, "json"),)
    assert members_of("SYN.json:syn_text") == ((JSON, "syn.json"),)


@pytest.mark.parametrize(
    ("choice", "near"), [("line", "lines"), ("json:", "json:FIELD"), ("", None), ("caption", "json:caption")]
)
def test_an_unknown_choice_is_refused_with_the_nearest(choice: str, near: str | None) -> None:
    with pytest.raises(UserError, match=r"default, lines, txt, json:FIELD or MEMBER\.json:FIELD") as caught:
        check_choice(choice)
    assert str(caught.value).endswith(f"did you mean {near!r}?" if near else "FIELD")
