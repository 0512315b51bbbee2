"""`docs/from-openclip.md` names every option of OpenCLIP's training script, and keys that exist."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from clipcluster.recipe.sections.base import walk
from clipcluster.recipe.sections.recipe import Recipe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "from-openclip.md"
ROW = re.compile(r"^\| `(--[a-z0-9-]+)` \| (.*?) \| (.*?) ?\|$", re.MULTILINE)


def rows() -> list[tuple[str, str, str]]:
    return ROW.findall(PAGE.read_text(encoding="utf-8"))


def test_every_option_has_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    params = pytest.importorskip("open_clip_train.params")
    known: list[str] = []

    def parse_args(parser: argparse.ArgumentParser, args: object) -> None:
        known.extend(action.option_strings[-1] for action in parser._actions if action.dest != "help")
        raise StopIteration

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(StopIteration):
        params.parse_args([])
    assert len(known) > 80
    assert sorted(option for option, _, _ in rows()) == sorted(known)


def test_every_key_exists() -> None:
    keys = {".".join(path).replace("*", "0") for path, _ in walk(Recipe)}
    named = [
        text
        for _, here, more in rows()
        for text in re.findall(r"`([^`]+)`", f"{here} {more}")
        if re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)+", text)
    ]
    assert len(named) > 40
    assert [text for text in named if text not in keys] == []
