"""Damaged tars, images and captions never crash, hang or lose a sample; `fuzz.py` is the long run.

What it has found stands here as examples of its own.
"""

import importlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SHORT, LONG = 40, 150  # examples of a seed


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    """The module fuzz.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield importlib.import_module("fuzz")


@pytest.fixture(scope="module")
def child(fuzz: ModuleType) -> Iterator[Any]:
    process = fuzz.Child()
    yield process
    process.close()


FOUND = {
    "an empty file was no index afterwards": ({"0.tar": b""}, False),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(fuzz: ModuleType, child: Any, tmp_path: Path, name: str) -> None:
    fuzz.check(fuzz.Example(*FOUND[name]), child, tmp_path)


def test_every_picture_is_used_when_it_is_whole(fuzz: ModuleType, child: Any, tmp_path: Path) -> None:
    members = [(f"{name}.jpg", data) for name, data in fuzz.pictures().items()]
    found = fuzz.check(fuzz.Example({"0.tar": fuzz.packed(members)}, True), child, tmp_path)
    assert found["keys"] == list(fuzz.pictures())
    assert not found["bad"]


def test_a_few_examples(fuzz: ModuleType, child: Any) -> None:
    tally = fuzz.campaign(0, SHORT, child)
    assert tally["examples"] >= SHORT
    assert min(tally["samples"], tally["broken tars"]) > 0


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_examples(fuzz: ModuleType, child: Any, seed: int) -> None:
    fuzz.campaign(seed, LONG, child)


def test_a_crash_and_a_hang_are_seen(fuzz: ModuleType, child: Any, tmp_path: Path, monkeypatch: Any) -> None:
    example = fuzz.Example({"0.tar": fuzz.packed([("a.jpg", b"")])}, True)
    fuzz.check(example, child, tmp_path)
    os.kill(child.pid, signal.SIGSEGV)
    with pytest.raises((AssertionError, BrokenPipeError), match=r"crashed with -11|Broken pipe"):
        fuzz.check(example, child, tmp_path)
    child.close()
    monkeypatch.setattr(fuzz, "PATIENCE", 0.01)
    with pytest.raises(AssertionError, match="hung"):
        fuzz.check(example, child, tmp_path)
