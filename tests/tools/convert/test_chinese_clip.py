"""`convert chinese-clip` and `convert lmdb`: the same data in both forms, record by record."""

import base64
import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.errors import UserError
from tools.convert.readers import chinese_clip as files
from tools.convert.readers import lmdb as databases
from tools.convert.records import BadRecord, InputFile, NoOptions, Record, Source, Split

IDS = {"files": [7, 12, 1031, 3], "lmdb": [3, 7, 12, 1031]}


def _open(*inputs: Path, kind: str = "files") -> Source:
    return (files if kind == "files" else databases).KIND.open(inputs, NoOptions())


def _all(split: Split) -> list[Record | tuple[str, str]]:
    """Every sample, or key and reason of a bad one."""
    found: list[Record | tuple[str, str]] = []
    for number in range(len(split)):
        try:
            found.append(split.read(number))
        except BadRecord as bad:
            found.append((bad.key, bad.reason))
    return found


def _records(split: Split) -> list[Record]:
    return [record for record in _all(split) if isinstance(record, Record)]


def _put(folder: Path, items: Iterable[tuple[bytes, bytes | None]]) -> None:
    """Puts into a database, or takes out."""
    with lmdb.open(str(folder), map_size=1 << 26) as environment, environment.begin(write=True) as change:
        for key, value in items:
            _ = change.delete(key) if value is None else change.put(key, value)


@pytest.mark.parametrize("kind", ["files", "lmdb"])
def test_every_record_is_exactly_what_was_put_in(chinese_clip: Any, tmp_path: Path, kind: str) -> None:
    for split in ("train", "valid"):
        folder = getattr(chinese_clip, kind)(tmp_path / "data", split)
    source = _open(folder, kind=kind)
    assert [split.name for split in source.splits] == ["train", "valid"]
    for split in source.splits:
        records = _records(split)
        assert [record.key for record in records] == [str(number) for number in IDS[kind]]
        for number, record in zip(IDS[kind], records, strict=True):
            wanted = chinese_clip.captions(number)
            assert record.image == chinese_clip.images[number]
            assert list(record.captions) == [text for _, text in wanted]
            assert record.fields == {"id": number, "text_ids": [text_id for text_id, _ in wanted]}
            assert record.cls is None
        exact = [len(record.image) for record in records]
        assert all(0 <= size - known <= 2 for size, known in zip(split.sizes(), exact, strict=True))
    texts = "4 texts, 1 of them without" if kind == "files" else "3 texts, 0 of them without"
    assert source.notes[0] == f"train: 4 images, 1 of them without a text; {texts} an image; 4 pairs"
    assert len(source.notes) == 2


def test_both_forms_hold_the_same(chinese_clip: Any, tmp_path: Path) -> None:
    chinese_clip.files(tmp_path, "train")
    chinese_clip.lmdb(tmp_path, "train")
    one, other = _open(tmp_path).splits[0], _open(tmp_path, kind="lmdb").splits[0]
    assert sorted(_records(one)) == sorted(_records(other))


def test_the_order_of_a_database_is_that_of_numbers(tmp_path: Path, picture: Any) -> None:
    for name in ("imgs", "pairs"):
        (tmp_path / "train" / name).mkdir(parents=True)
    pairs = [(image, 100 - image, f"text {at} of {image}") for at in range(4) for image in (2, 30, 111)]
    images = [(b"%d" % n, base64.b64encode(picture(n))) for n in (2, 30, 111)]
    _put(tmp_path / "train" / "imgs", [*images, (b"num_images", b"3")])
    pickles = [(b"%d" % at, pickle.dumps(pair)) for at, pair in enumerate(pairs)]
    _put(tmp_path / "train" / "pairs", [*pickles, (b"num_samples", b"12")])
    records = _records(_open(tmp_path, kind="lmdb").splits[0])
    assert [record.key for record in records] == ["2", "30", "111"]
    for record in records:  # the keys 0 to 11: 10 and 11 come last, though their bytes do not
        assert record.captions == [f"text {at} of {record.key}" for at in range(4)]


def test_files_one_by_one_and_without_texts(chinese_clip: Any, tmp_path: Path) -> None:
    chinese_clip.files(tmp_path, "train")
    chinese_clip.files(tmp_path, "a_b")
    source = _open(tmp_path / "a_b_texts.jsonl", tmp_path / "a_b_imgs.tsv")
    assert [(split.name, len(split)) for split in source.splits] == [("a_b", 4)]
    assert source.inputs == [InputFile.of(tmp_path / f"a_b_{name}") for name in ("imgs.tsv", "texts.jsonl")]
    alone = _open(tmp_path / "train_imgs.tsv")
    assert alone.notes[0] == "train: train_texts.jsonl is not there: images without captions"
    assert [list(record.captions) for record in _records(alone.splits[0])] == [[], [], [], []]
    (tmp_path / "train_imgs.tsv").unlink()
    source = _open(tmp_path)
    assert [split.name for split in source.splits] == ["a_b"]
    assert any(note.startswith("train was left out: ") for note in source.notes)


def test_lines_that_cannot_be_used(tmp_path: Path, picture: Any) -> None:
    image = base64.b64encode(picture(1)).decode()
    urlsafe = base64.urlsafe_b64encode(picture(2)).decode()
    lines = [
        f"\ufeff5\t{image}\r",
        "6 and no tab",
        f"x\t{image}",
        "",
        f"8\t{urlsafe}",
        f"5\t{image}",
        f"9\t{image[:-7]}",
        f"10\t{image[:50]}*{image[50:]}",
        f"-1\t{image}",
    ]
    (tmp_path / "train_imgs.tsv").write_text("\n".join(lines), encoding="utf-8")
    texts = [
        json.dumps({"text_id": 1, "text": "one", "image_ids": [8, 5, 77]}).encode(),
        b"{not json",
        b'{"text_id": 2, "text": "caf\xe9", "image_ids": [8]}',
        b'{"text_id": 3, "text": "\\ud83d", "image_ids": [8]}',
        b'{"text_id": 4, "text": "four", "image_ids": ["8"]}',
        b'{"text_id": 5, "text": ["five"], "image_ids": [8]}',
        b'{"text_id": 6, "image_ids": [8]}',
        b'{"text_id": 7, "text": " ", "image_ids": [8]}',
        b'{"text_id": 8, "text": "last", "image_ids": [8, 78]}',
    ]
    (tmp_path / "train_texts.jsonl").write_bytes(b"\n".join(texts))
    source = _open(tmp_path)
    found = _all(source.splits[0])
    first, eight = (record for record in found if isinstance(record, Record))
    assert (first.key, first.image, first.captions) == ("5", picture(1), ["one"])
    assert (eight.key, eight.image, eight.captions) == ("8", picture(2), ["one", "last"])
    assert eight.fields["text_ids"] == [1, 8]
    bad = [entry for entry in found if not isinstance(entry, Record)]
    assert [key for key, _ in bad] == [
        *["line-2", "line-3", "5", "9", "10", "line-9"],
        *[f"text-line-{line}" for line in (2, 3, 4, 5, 6, 7)],
    ]
    reasons = dict(bad)
    assert reasons["line-2"] == "train_imgs.tsv, line 2: expected a number, a tab and base64"
    assert reasons["5"] == "train_imgs.tsv: the id also appears on an earlier line"
    assert "broken base64" in reasons["9"]
    assert "broken base64" in reasons["10"]
    assert "train_texts.jsonl, line 3: 'utf-8' codec" in reasons["text-line-3"]
    assert "surrogates" in reasons["text-line-4"]
    assert "a value that is not an id" in reasons["text-line-5"]
    assert any(
        "2 pairs name images that are not there, the first: text 1, image 77" in n for n in source.notes
    )
    assert any("6 texts cannot be used; the first: text-line-2: train_texts" in n for n in source.notes)
    assert len(source.splits[0].sizes()) == len(found)


class _Evil:
    """What somebody might put into a pickle."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/evil",)


def test_entries_that_cannot_be_used(chinese_clip: Any, tmp_path: Path, picture: Any) -> None:
    folder = chinese_clip.lmdb(tmp_path, "train") / "lmdb" / "train"
    _put(folder / "imgs", [(b"007", b"x"), (b"note", b"mine"), (b"12", b"*"), (b"num_images", b"9")])
    items = {
        b"4": pickle.dumps(_Evil()),
        b"5": b"no pickle",
        b"6": pickle.dumps([7, 8, "a list"]),
        b"7": pickle.dumps((7, "8", "a string")),
        b"8": pickle.dumps((-7, 8, "below zero")),
        b"9": pickle.dumps((99, 5, "of an image that is not there")),
        b"x": pickle.dumps((7, 8, "no number")),
    }
    _put(folder / "pairs", [*items.items(), (b"num_samples", None)])
    source = _open(tmp_path, kind="lmdb")
    found = _all(source.splits[0])
    assert [record.key for record in found if isinstance(record, Record)] == ["3", "7", "1031"]
    bad = dict(entry for entry in found if not isinstance(entry, Record))
    assert list(bad) == ["12", "007", "note", "pair-4", "pair-5", "pair-6", "pair-7", "pair-8", "pair-x"]
    assert "a pickle that asks for posix.system" in bad["pair-4"]
    assert "not a readable pickle" in bad["pair-5"]
    assert "not of (image_id, text_id, text)" in bad["pair-6"]
    assert "not of (image_id, text_id, text)" in bad["pair-7"]
    assert "broken base64" in bad["12"]
    assert "train: num_images is 9, but 4 are there" in source.notes
    assert "train: num_samples is nothing, but 11 are there" in source.notes
    assert any(
        "1 pairs name images that are not there, the first: text 5, image 99" in n for n in source.notes
    )


def test_a_database_that_was_cut_is_refused(chinese_clip: Any, tmp_path: Path, picture: Any) -> None:
    folder = chinese_clip.lmdb(tmp_path, "train") / "lmdb" / "train"
    large = base64.b64encode(b"\xff\xd8\xff" + bytes(12 << 20))  # more than the map is by default
    _put(folder / "imgs", [(b"500", large)])
    whole = (folder / "imgs" / "data.mdb").read_bytes()
    (record,) = [r for r in _records(_open(folder, kind="lmdb").splits[0]) if r.key == "500"]
    assert len(record.image) == 3 + (12 << 20)
    (folder / "imgs" / "data.mdb").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"imgs/data.mdb was cut, it has .* bytes: copy it again"):
        _open(folder, kind="lmdb")
    (folder / "imgs" / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match=r"imgs is not a readable database: .*not an LMDB file"):
        _open(folder, kind="lmdb")


def test_what_is_not_there_is_said(chinese_clip: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "thesis.txt").write_text("mine")
    for inputs, words in (
        ([tmp_path / "empty"], r"empty: no images there; .*SPLIT_imgs.tsv"),
        ([], "no INPUT was given"),
        ([tmp_path / "nothing"], "nothing is not there"),
        ([tmp_path / "thesis.txt"], r"thesis.txt: convert chinese-clip takes a folder"),
    ):
        with pytest.raises(UserError, match=words):
            _open(*inputs)
    one = chinese_clip.files(tmp_path / "one", "train")
    other = chinese_clip.files(tmp_path / "other", "train")
    with pytest.raises(UserError, match="belong to one split"):
        _open(one, other)
    for inputs, words in (
        ([tmp_path / "empty"], r"empty: no such databases; .*SPLIT/imgs and SPLIT/pairs"),
        ([], "no INPUT was given"),
        ([tmp_path / "thesis.txt"], "is not an existing folder"),
    ):
        with pytest.raises(UserError, match=words):
            _open(*inputs, kind="lmdb")
    chinese_clip.lmdb(tmp_path / "one", "train")
    chinese_clip.lmdb(tmp_path / "other", "train")
    with pytest.raises(UserError, match="are both called train"):
        _open(tmp_path / "one" / "lmdb", tmp_path / "other", kind="lmdb")
    (tmp_path / "one" / "lmdb" / "train" / "pairs" / "data.mdb").unlink()
    with pytest.raises(UserError, match=r"train has imgs/data.mdb but no pairs/data.mdb"):
        _open(tmp_path / "one", kind="lmdb")


def _key_and_bytes(split: Split, number: int) -> tuple[str, bytes]:
    record = split.read(number)
    return record.key, record.image


@pytest.mark.parametrize("kind", ["files", "lmdb"])
def test_read_from_other_processes(chinese_clip: Any, tmp_path: Path, kind: str, in_others: Any) -> None:
    (split,) = _open(getattr(chinese_clip, kind)(tmp_path, "train"), kind=kind).splits
    here = [_key_and_bytes(split, number) for number in range(4)]
    assert in_others(_key_and_bytes, split, range(4)) == here
    assert [_key_and_bytes(split, number) for number in range(4)] == here


_ids = st.lists(st.integers(0, 9), max_size=9)


@given(images=_ids.filter(len), texts=st.lists(_ids, max_size=5))
def test_texts_are_joined_by_id(
    tmp_path_factory: pytest.TempPathFactory, images: list[int], texts: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("joined")
    lines = [f"{number}\t{base64.b64encode(b'x').decode()}\n" for number in images]
    (folder / "train_imgs.tsv").write_text("".join(lines))
    documents = [{"text_id": at, "text": "words", "image_ids": ids} for at, ids in enumerate(texts)]
    (folder / "train_texts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    source = _open(folder)
    found = _all(source.splits[0])
    for at, (number, entry) in enumerate(zip(images, found, strict=True)):
        assert isinstance(entry, Record) == (number not in images[:at])
        if isinstance(entry, Record):
            wanted = [text for text, ids in enumerate(texts) for image in ids if image == number]
            assert entry.fields["text_ids"] == wanted
    unknown = sum(image not in images for ids in texts for image in ids)
    told = any(f"{unknown} pairs name images that are not there" in note for note in source.notes)
    assert told == (unknown > 0)
