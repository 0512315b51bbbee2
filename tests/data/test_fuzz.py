"""Damaged tars, images, captions and indexes never crash, hang or lose a sample; `fuzz.py` and
`fuzz_index.py` are the long runs.

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
INDEXES = 15  # each is read, verified and indexed again


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
# Sizes that Python's tarfile itself does not survive: examples as failures print them.
HUGE = (
    "c-rmMy9&ZU5QX6>w6V8OX|>tS#ZC|_OJ8BZAn``<0wM^h1i>;suO?cAAeK=i|JUp?%`7{dNn5vWPo7TMwXN08ZnBZ&"
    "CFLr2II)LuWT(+aYN1~~om!i)yccz&J!8Z<$QSIl`CsJirJ0QHtakA#8W<IJ1WjYrIyu(dqX>0B2;TCa-b-cty*&SZ"
    "5c=Y1@?X1Uyk4kzGW*5+D?7is|9umP<Jr1j#{2;Q00000000000KostwwH6J9_I~3O#",
    "c-rmMJqyA>41nPby12V{bUN?a+D?KvIr<k4EaFFtSOpOTCqZzmzgJrw3W{Sz>H91Rw_Hd_j*V-(BM*n{($s2W*V$0="
    "C)HKm!PxFbk)1?qsf2!di^p3@mqZ&s>}hd!@&(&8??qmc)RXa?cr%NmzEQoFpl+;6R{M(oD3&_#{ZDt`C3o{Y2z4Ni"
    "X8$X<oFxl2Urm2!{>A;*p7F(TZPk@Ae*gdg0000000000@c**(e9F`v)7V8;",
)


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(fuzz: ModuleType, child: Any, tmp_path: Path, name: str) -> None:
    fuzz.check(fuzz.Example(*FOUND[name]), child, tmp_path)


@pytest.mark.parametrize("text", HUGE, ids=range(len(HUGE)))
def test_what_failed_as_it_was_printed(fuzz: ModuleType, child: Any, tmp_path: Path, text: str) -> None:
    found = fuzz.check(fuzz.Example.of(text), child, tmp_path)
    assert found["shards"]["0.tar"][3] is not None


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


@pytest.fixture(scope="module")
def fuzz_index(fuzz: ModuleType) -> ModuleType:
    """The module fuzz_index.py, which finds fuzz.py beside it."""
    return importlib.import_module("fuzz_index")


@pytest.fixture(scope="module")
def index_child(fuzz: ModuleType, fuzz_index: ModuleType) -> Iterator[Any]:
    process = fuzz.Child(fuzz_index.__file__)
    yield process
    process.close()


def test_a_few_indexes(fuzz_index: ModuleType, index_child: Any, tmp_path: Path) -> None:
    tally = fuzz_index.campaign(0, INDEXES, fuzz_index.folder_of(tmp_path), index_child)
    assert tally["examples"] >= INDEXES
    assert min(tally["read"], tally["UserError"], tally["DataError"]) > 0


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_many_indexes(fuzz_index: ModuleType, index_child: Any, tmp_path: Path) -> None:
    whole = fuzz_index.folder_of(tmp_path)
    for seed in range(1, 9):
        fuzz_index.campaign(seed, LONG, whole, index_child)


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
