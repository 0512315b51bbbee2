"""What is shown of addresses and commands: enough to find them, never what opens them."""

import json
import logging
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from clipcluster.data.shards.open import open_source
from clipcluster.data.storage import download
from clipcluster.data.storage.cache import Cache
from clipcluster.data.storage.urls import RemoteFolder, braces, folder_at, named, redacted, redacted_within
from clipcluster.errors import UserError
from clipcluster.evals.headline import set_names
from clipcluster.recipe.sections.data import Source
from clipcluster.runtime.outcome import DataError
from tools.shards.index import index_folders


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host/a%20b/{00..09}.tar", "https://host/a%20b/{00..09}.tar"),
        ("https://user:hidden@host/a", "https://host/a"),
        ("https://user:hid@den@host/a@b", "https://host/a@b"),
        ("https://host/0.tar?X-Amz-Signature=hidden&X-Amz-Date=1", "https://host/0.tar"),
        ("https://host/0.tar?hidden", "https://host/0.tar"),
        ("https://host/0.tar#hidden", "https://host/0.tar"),
        ("s3://key:hidden@bucket/0?.tar", "s3://bucket/0?.tar"),
        ("s3://bucket/0.tar?versionId=hidden", "s3://bucket/0.tar"),
        ("hf://datasets/owner/name@main/0.tar", "hf://datasets/owner/name@main/0.tar"),
        ("https://host/token=hidden/0.tar", "https://host/token=…"),
        ("/data/coco/train", "/data/coco/train"),
        ("pipe:cat /x/{00..09}.tar", "pipe:cat … {00..09}.tar"),
        ("pipe:curl -sH 'Authorization: Bearer hidden' https://u:hidden@h/x/00.tar", "pipe:curl … 00.tar"),
        ("pipe:KEY=hidden aws s3 cp 's3://b/00.tar' - | cat", "pipe:aws … 00.tar"),
        ("pipe:curl https://h/00.tar?sig=hidden", "pipe:curl …"),
        ("pipe:", "pipe:…"),
        ("403 for https://a:hidden@h/x?sig=hidden and http://h/y", "403 for https://h/x and http://h/y"),
        ("curl: (22) Authorization: Bearer hidden refused", "curl: (22) Authorization: Bearer … refused"),
        ("api_key='hidden' password: hidden AWS_SECRET_ACCESS_KEY=hidden", None),
    ],
)
def test_what_is_shown(text: str, shown: str | None) -> None:
    assert "hidden" not in redacted(text)
    if shown is not None:
        assert redacted(text) == shown
        assert redacted(shown) == shown or text.startswith("pipe:")


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("x/{08..10}{a,b}.tar", "x/08a.tar x/08b.tar x/09a.tar x/09b.tar x/10a.tar x/10b.tar"),
        ("{a,b{1..3}}/x", "a/x b1/x b2/x b3/x"),
        ("{a{1,2}b{x,y},{c,{d,e}f}}g", "a1bxg a1byg a2bxg a2byg cg dfg efg"),
        ("a{b{c,d}", "a{bc a{bd"),
        ("a}b,{c,}d", "a}b,cd a}b,d"),
    ],
)
def test_braces_are_those_of_a_shell(pattern: str, expanded: str) -> None:
    assert braces(pattern) == expanded.split()


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)) + str(vars(error))


SIGNED = "http://user:hidden@127.0.0.1:9/train{}?X-Amz-Signature=hidden"
COMMAND = "pipe:curl -sH 'X-Key: hidden' http://127.0.0.1:9{}?sig=hidden"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"shards": SIGNED.format("")}, "127.0.0.1:9/train"),
        ({"shards": SIGNED.format("/{00..03}.tar")}, "127.0.0.1:9/train"),
        ({"shards": SIGNED.format("/*/{00..03}.tar")}, "an http server cannot list"),
        ({"shards": COMMAND.format("")}, "no word of this command ends in .tar"),
        ({"shards": "pipe:hidden=1 curl hidden {a,b}/0.tar"}, "two of its commands print 0.tar"),
        ({"shards": "pipe:curl hidden {00..03}.tar"}, "cannot list its shards"),
        ({"shards": "pipe:curl hidden {00..03}.tar", "index": "{tmp}"}, "there is no index in"),
        ({"shards": "{tmp}", "index": SIGNED.format("")}, "their index must be too"),
        ({"shards": "nowhere://user:hidden@host/x"}, "nowhere://host/x"),
    ],
)
def test_no_message_of_a_source_shows_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, str], words: str
) -> None:
    monkeypatch.setattr(download, "QUESTIONS", ())
    source = Source.model_validate({key: text.replace("{tmp}", str(tmp_path)) for key, text in keys.items()})
    with pytest.raises((UserError, OSError)) as error:
        open_source(source, text=True, cache=Cache(str(tmp_path / "cache")))
    assert words in str(error.value)
    assert "hidden" not in _told(error.value)


def test_no_message_of_an_index_shows_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "QUESTIONS", ())
    monkeypatch.setattr(download, "RETRIES", ())
    monkeypatch.setenv("CLIPCLUSTER_CACHE", str(tmp_path / "cache"))
    signed, command = SIGNED.format(""), COMMAND.format("")
    several, refused = SIGNED.format("/{1,2}/{00..03}.tar"), SIGNED.format("/0.tar")
    for written, index in (
        (signed, None), (signed, tmp_path), (several, tmp_path), (refused, tmp_path), (command, tmp_path)
    ):  # fmt: skip
        with pytest.raises((UserError, OSError)) as error:
            index_folders([written], index=index)
        assert "hidden" not in _told(error.value)


def test_what_is_written_of_a_source_shows_no_key(
    tmp_path: Path, make_shards: Callable[..., Path], web_server: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The name in a checkpoint, an index on this machine, a log, a command's error, a repr."""
    monkeypatch.setenv("CLIPCLUSTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "RETRIES", (0.01,))
    caplog.set_level(logging.DEBUG)
    folder = make_shards(tmp_path / "served" / "train", 12)
    server = web_server(folder.parent)
    server.password = "user:hidden"
    address = server.address.replace("//", "//user:hidden@") + "/train/{00000..00001}.tar?sig=hidden"
    (made,) = index_folders([address], index=tmp_path / "index")
    for path in (tmp_path / "index").iterdir():
        assert b"hidden" not in path.read_bytes()
    assert "hidden" not in json.dumps({**asdict(made), "folder": str(made.folder), "index": ""}, default=str)
    source = Source.model_validate({"shards": address, "index": str(tmp_path / "index")})
    dataset = open_source(source, text=True, cache=Cache(str(tmp_path / "other")))
    assert dataset.name == "train"
    shown = f"{dataset.folders} {dataset.folders[0].folder} {dataset.shard_location(0)!r} {named(address)}"
    assert "hidden" not in shown
    server.status = 500
    with pytest.raises(OSError, match="500") as error:
        dataset.read(0)
    assert "hidden" not in _told(error.value)
    failing = "pipe:echo https://user:hidden@host/ token=hidden >&2; echo {00000..00001}.tar; exit 3"
    source = Source.model_validate({"shards": failing, "index": str(tmp_path / "index")})
    command = open_source(source, text=True, cache=Cache(str(tmp_path / "other")))
    assert command.name == "index"
    with pytest.raises((OSError, DataError), match="failed with code 3: https://host/ token=…") as error:
        command.read(0)
    assert "hidden" not in _told(error.value)
    assert "hidden" not in caplog.text


def test_a_value_of_a_recipe_is_shown_without_keys() -> None:
    value = [{"shards": ["https://u:hidden@h/x", "pipe:curl hidden 0.tar"], "weight": 2}, None]
    assert redacted_within(value) == [{"shards": ["https://h/x", "pipe:curl … 0.tar"], "weight": 2}, None]


def test_the_names_of_evaluations_show_no_key() -> None:
    folders = ["https://user:hidden@host/a/val?sig=hidden", "https://host/b/val", "/data/val", "/data/pets"]
    names = set_names(folders)
    assert list(names.values()) == ["a-val", "b-val", "data-val", "pets"]
    assert set_names(["https://user:hidden@host"])["https://user:hidden@host"] == "host"


def test_a_folder_is_shown_by_its_name_alone() -> None:
    folder = folder_at("https://user:hidden@host/x?sig=hidden")
    assert folder == RemoteFolder("https://user:hidden@host/x", "sig=hidden")
    assert (folder / "0.tar").address == "https://user:hidden@host/x/0.tar?sig=hidden"
    assert "hidden" not in f"{folder} {folder!r} {folder / '0.tar'} {folder / '0.tar'!r} {folder.name}"


@pytest.mark.parametrize(
    ("written", "taken"),
    [
        ("{a*,ab*}", [("aa", None), ("ab", None)]),
        ("{a*/0,ab/0}.tar", [("aa", ("0.tar",)), ("ab", ("0.tar",))]),
        ("{b/0.tar,aa}", [("aa", None), ("b", ("0.tar",))]),
        ("{b/{0..1},aa/2,b/3}.tar", [("b", ("0.tar", "1.tar", "3.tar")), ("aa", ("2.tar",))]),
    ],
)
def test_an_entry_takes_a_folder_once(tmp_path: Path, written: str, taken: list[Any]) -> None:
    for name in ("aa", "ab", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").touch()
    assert [(one.folder.name, one.tars) for one in named(f"file://{tmp_path}/{written}")] == taken


@pytest.mark.parametrize(
    ("address", "above"),
    [
        ("hf://datasets/owner/name/train", "hf://datasets/owner/name"),
        ("hf://datasets/owner/name@main", "None"),
        ("hf://owner/name", "None"),
        ("s3://bucket/train", "s3://bucket"),
        ("s3://bucket", "None"),
    ],
)
def test_above_a_repository_there_is_no_folder(address: str, above: str) -> None:
    assert str(RemoteFolder(address).parent) == above


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_forbids_is_named(
    tmp_path: Path, make_shards: Callable[..., Path], web_server: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch, status: int,
) -> None:  # fmt: skip
    """And not the folder of the index, which can be written to."""
    monkeypatch.setenv("CLIPCLUSTER_CACHE", str(tmp_path / "cache"))
    server = web_server(make_shards(tmp_path / "train", 12))
    server.status, server.status_of = status, ".tar"
    with pytest.raises(UserError, match=rf"00000\.tar: the server answers {status}") as error:
        index_folders([server.address + "/{00000..00001}.tar"], index=tmp_path / "index")
    assert "--index" not in str(error.value)
    server.status_of = "index.bin"
    source = Source.model_validate({"shards": server.address})
    with pytest.raises(UserError, match=f"index.bin.*the server answers {status}"):
        open_source(source, text=True, cache=Cache(str(tmp_path / "other")))
