"""Where a conversion may read and write, and options that mean nothing: refused before it begins."""

from pathlib import Path
from typing import Any

import pytest

from clipcluster.errors import UserError
from tools.convert.convert import Settings, convert
from tools.convert.readers.shards import Options

JPEG = b"\xff\xd8\xff\xe0"


@pytest.fixture
def classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "1.jpg").write_bytes(JPEG)
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "out", "settings", "wanted"),
    [
        ("in", "file", {}, "--out file: file is a file"),
        ("in", "file/below", {}, "file is a file"),
        ("in", "in/shards", {}, "lies in in"),
        ("in", "out", {"resize_mode": "square"}, "^--resize-mode square: it goes with --resize SIDE"),
        ("in", "out", {"quality": 50}, "^--quality 50: it goes with --resize SIDE"),
        ("in", "/proc/x", {}, "^--out /proc/x: the folder cannot be created"),
    ],
)
def test_places_and_options_that_cannot_be_meant(
    classes: Path, inputs: str, out: str, settings: dict[str, Any], wanted: str
) -> None:
    before = sorted(classes.rglob("*"))
    with pytest.raises(UserError, match=wanted):
        convert("folder", Path(out), [Path(inputs)], settings=Settings(**settings))
    assert sorted(classes.rglob("*")) == before


@pytest.mark.parametrize("kinds", [("JPG",), ("",), ("JPEG,jpg",)])
def test_a_kind_that_does_not_exist_is_told_the_names(classes: Path, kinds: tuple[str, ...]) -> None:
    convert("folder", Path("out"), [Path("in")])
    with pytest.raises(UserError, match="there are JPEG, PNG"):
        convert("shards", Path("other"), [Path("out")], Options(kinds=kinds))


def test_a_damaged_description_is_told_with_the_way_out(classes: Path) -> None:
    convert("folder", Path("out"), [Path("in")])
    (classes / "out" / "conversion.json").write_text("{")
    with pytest.raises(UserError, match=r"^out/conversion.json is damaged; remove out and convert again$"):
        convert("folder", Path("out"), [Path("in")])


def test_a_folder_of_tables_is_told_how_they_are_given(classes: Path) -> None:
    with pytest.raises(UserError, match=r"in is a folder.*in/\*\.csv"):
        convert("csv", Path("out"), [Path("in")])
