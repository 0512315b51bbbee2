"""Which texts are captions, and the texts beside shards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from clipcluster.data.shards.open import open_folder
from clipcluster.data.storage.cache import Cache
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


@pytest.fixture(params=["here", "there", "in the index"])
def opened(
    request: pytest.FixtureRequest, tmp_path: Path, make_shards: Callable[..., Path], web_server: Any
) -> Callable[[bytes], Any]:
    """opened(text): a dataset with this classnames.txt, on this machine, on a server, beside its index."""
    folder = make_shards(tmp_path / "train", 3)

    def open_with(text: bytes) -> Any:
        (folder / "classnames.txt").write_bytes(text)
        (folder / "zeroshot_classification_templates.txt").write_bytes(text)
        if request.param == "here":
            return open_folder(folder)
        index = folder if request.param == "in the index" else None
        return open_folder(web_server(folder).address, index, cache=Cache(str(tmp_path / "cache")))

    return open_with


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"cat\ndog\n", ["cat", "dog"]),
        (b"cat\r\ndog", ["cat", "dog"]),
        (b"\xef\xbb\xbfcat\ndog\n\n \n", ["cat", "dog"]),
        ("cat\x85s\nd\u2028og\x0c\n".encode(), ["cat\x85s", "d\u2028og\x0c"]),
        (b"", []),
    ],
)
def test_a_line_is_a_class(opened: Callable[[bytes], Any], text: bytes, names: list[str]) -> None:
    dataset = opened(text)
    assert dataset.classnames == names
    assert dataset.templates == names


def test_an_empty_line_shifts_no_class(opened: Callable[[bytes], Any]) -> None:
    dataset = opened(b"cat\n\ndog\n")
    with pytest.raises(UserError, match=r"classnames\.txt: line 2 is empty, .* the name of class 1"):
        _ = dataset.classnames
    assert dataset.templates == ["cat", "dog"]


def test_bytes_that_are_no_text(opened: Callable[[bytes], Any]) -> None:
    with pytest.raises(UserError, match=r"classnames\.txt: not UTF-8 text"):
        _ = opened(b"cat\n\xff\n").classnames
