"""Several choices of captions in one index, and what an index of an older format is good for."""

import io
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.data.shards import indexing, metadata
from clipcluster.data.shards.columns import read_columns, write_columns
from clipcluster.data.shards.folder_index import COLUMNS_FILE, write_folder_index
from clipcluster.data.shards.indexing import index_folder
from clipcluster.data.shards.metadata import Concatenated
from clipcluster.data.shards.open import open_folder, open_source
from clipcluster.data.shards.shard_index import scan_shard, shard_index_path
from clipcluster.data.shards.shard_list import ENTRIES_FILE, read_list, read_summary
from clipcluster.data.shards.tar import END, header, padded
from clipcluster.errors import UserError
from clipcluster.recipe.sections.data import Source

SYNTHETIC = "syn.json:syn_text"


def _tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = [header(name, len(data)) + data + bytes(padded(len(data)) - len(data)) for name, data in members]
    path.write_bytes(b"".join(blocks) + END)
    return path


def _reinforced(folder: Path, counts: list[tuple[int, int]], per_shard: int = 3) -> Path:
    """Samples with (0 or 1) captions in txt and some synthetic ones in syn.json; every second has a class."""
    for shard in range(0, len(counts), per_shard):
        members = []
        for number in range(shard, min(shard + per_shard, len(counts))):
            own, synthetic = counts[number]
            members.append((f"{number:04d}.jpg", b"image"))
            if own:
                members.append((f"{number:04d}.txt", f"own {number}".encode()))
            texts = {"syn_text": [f"synthetic {number} {i}" for i in range(synthetic)]}
            members.append((f"{number:04d}.syn.json", json.dumps(texts).encode()))
            if number % 2:
                members.append((f"{number:04d}.cls", b"7"))
        _tar(folder / f"{shard:04d}.tar", members)
    return folder


COUNTS = [(1, 5), (0, 5), (1, 0), (0, 0), (1, 5), (1, 2), (0, 1)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _reinforced(tmp_path / "dr", COUNTS)


def test_a_choice_is_added_without_hashing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = index_folder(folder)
    before = open_folder(folder)
    monkeypatch.setattr(indexing, "file_sha256", lambda path: pytest.fail(f"{path} is hashed"))
    both = index_folder(folder, captions_choice=SYNTHETIC)
    assert list(first.choices) == ["default"]
    assert {name: (c.captions, c.used, c.without_caption) for name, c in both.choices.items()} == {
        "default": (4, 4, 3),
        SYNTHETIC: (18, 5, 2),
    }
    assert read_summary(folder) == both
    assert index_folder(folder) == both  # none asked for: those that are there
    after = open_folder(folder)
    assert after.fingerprint == before.fingerprint
    assert before.read(0) == after.read(0)
    assert open_folder(folder, captions_in=SYNTHETIC).read(1).captions == [
        f"synthetic 1 {i}" for i in range(5)
    ]


def test_only_what_changed_is_hashed_when_a_choice_is_added(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_folder(folder)
    _tar(folder / "0003.tar", [("x.jpg", b"i"), ("x.txt", b"a cat")])
    hashed: list[str] = []
    real = indexing.file_sha256
    monkeypatch.setattr(indexing, "file_sha256", lambda path: hashed.append(path.name) or real(path))
    index_folder(folder, captions_choice=["txt", SYNTHETIC])
    assert hashed == ["0003.tar"]
    assert list(read_summary(folder).choices) == ["default", "txt", SYNTHETIC]
    assert open_folder(folder, captions_in="txt").caption_counts().tolist() == [1, 0, 1, 1, 0]


def test_several_processes_add_a_choice_as_one_does(folder: Path, tmp_path: Path) -> None:
    for place, workers in (("one", 1), ("two", 2)):
        index_folder(folder, tmp_path / place)
        index_folder(folder, tmp_path / place, SYNTHETIC, workers=workers)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_fields_with_probabilities_lie_end_to_end(folder: Path) -> None:
    index_folder(folder, captions_choice=["default", SYNTHETIC])
    asked = {SYNTHETIC: 3, "default": 1}
    source = Source.model_validate({"shards": str(folder), "captions_in": asked})
    shards = open_source(source, text=True)
    assert [(field.choice, field.probability) for field in shards.fields] == [
        ("default", 0.25),
        (SYNTHETIC, 0.75),
    ]
    assert [field.counts.tolist() for field in shards.fields] == [list(c) for c in zip(*COUNTS, strict=True)]
    assert list(shards.caption_counts()) == [sum(counts) for counts in COUNTS]
    assert shards.n_pairs == 22
    assert shards.more_than.tolist() == [[3, 2, 1]]  # samples with any caption, by shard
    assert np.flatnonzero(shards.caption_counts()).tolist() == [0, 1, 2, 4, 5, 6]
    assert shards.classes.tolist() == [-1, 7, -1, 7, -1, 7, -1]
    assert shards.read(5).captions == ["own 5", "synthetic 5 0", "synthetic 5 1"]
    assert shards.read(3).captions == []
    shards.announce(range(7))


def test_samples_with_any_caption_are_counted_in_stretches(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_folder(folder, captions_choice=["default", SYNTHETIC])
    for stretch in (1, 2, 64):
        monkeypatch.setattr(metadata, "_SHARDS", stretch)
        assert open_folder(folder, captions_in={"default": 1, SYNTHETIC: 1}).more_than.tolist() == [[3, 2, 1]]


def test_one_choice_is_one_field(folder: Path) -> None:
    index_folder(folder, captions_choice=SYNTHETIC)
    shards = open_folder(folder, captions_in=SYNTHETIC)
    ((choice, probability, counts),) = shards.fields
    assert (choice, probability, counts.tolist()) == (SYNTHETIC, None, [5, 5, 0, 0, 5, 2, 1])
    assert shards.more_than.tolist() == [[2, 2, 1], [2, 2, 0], [2, 1, 0], [2, 1, 0], [2, 1, 0]]
    for column in (counts, shards.more_than, shards.classes, shards.sample_counts):
        assert not column.flags.owndata  # mapped, and shared by the processes of a node


def test_folders_and_cut_folders_lie_end_to_end(folder: Path, tmp_path: Path) -> None:
    other = _reinforced(tmp_path / "other", [(1, 9)] * 4, per_shard=2)
    for place in (folder, other):
        index_folder(place, captions_choice=["default", SYNTHETIC])
    source = {"shards": [str(folder), f"{other}/0002.tar"], "captions_in": {"default": 1, SYNTHETIC: 1}}
    shards = open_source(Source.model_validate(source), text=True)
    assert list(shards.caption_counts()) == [sum(c) for c in COUNTS] + [10, 10]
    assert shards.classes[-3:].tolist() == [-1, -1, 7]
    assert shards.more_than.tolist() == [[3, 2, 1, 2]]
    assert shards.sample_counts.tolist() == [3, 3, 1, 2]
    assert len(shards.read(8).captions) == 10
    alone = open_source(Source.model_validate({**source, "captions_in": SYNTHETIC}), text=True)
    assert alone.more_than.shape == (9, 4)
    assert alone.n_pairs == 18 + 18


def test_a_choice_the_index_lacks_is_named_with_its_command(folder: Path) -> None:
    index_folder(folder, captions_choice=SYNTHETIC)
    with pytest.raises(UserError, match=r"do you mean 'syn.json:syn_text'.*--captions syn.json:syn_txt$"):
        open_folder(folder, captions_in="syn.json:syn_txt")
    source = Source.model_validate({"shards": str(folder), "captions_in": {"txt": 1, "json:a b": 1}})
    with pytest.raises(
        UserError,
        match=r"; where the samples have that field, add them with: .* --captions 'json:a b' --captions txt$",
    ):
        open_source(source, text=True)
    index_folder(folder, captions_choice="json:nothing")
    source = Source.model_validate({"shards": str(folder), "captions_in": {SYNTHETIC: 1, "json:nothing": 1}})
    with pytest.raises(UserError, match="no sample has a caption by the choice 'json:nothing'"):
        open_source(source, text=True)


def test_an_index_of_format_1_is_refused_then_made_anew_without_hashing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_folder(folder, captions_choice="txt")
    document = json.loads((folder / ENTRIES_FILE).read_text())
    old = {**document, "format": 1, "captions_choice": "txt", "captions": document["captions"]["txt"]}
    for entry in old["shards"]:
        entry["captions"] = entry["captions"]["txt"]
        entry["without_caption"] = entry.pop("without_caption", {}).get("txt", 0)
    (folder / ENTRIES_FILE).write_text(json.dumps(old))
    write_columns(folder / COLUMNS_FILE, {"format": 1, "captions_choice": "txt"}, {})
    for path in folder.glob("*.idx"):
        write_columns(path, {"format": 1, "captions": "txt"}, {})
    with pytest.raises(
        UserError, match=f"another format .1.; rebuild it with: clipcluster shards index {folder}$"
    ):
        open_folder(folder, captions_in="txt")
    with pytest.raises(UserError, match=r"index\.json is damaged or of another format"):
        read_summary(folder)
    monkeypatch.setattr(indexing, "file_sha256", lambda path: pytest.fail(f"{path} is hashed"))
    index_folder(folder)
    assert open_folder(folder, captions_in="txt").caption_counts().tolist() == [own for own, _ in COUNTS]


def test_the_table_holds_what_processes_share(folder: Path) -> None:
    index_folder(folder)
    arrays = read_columns(folder / COLUMNS_FILE).arrays
    assert arrays["sample_ends"].tolist() == [3, 6, 7]
    assert arrays["classes"].dtype == np.int32
    assert arrays["captions/default"].dtype == np.uint8
    _tar(folder / "0000.tar", [("a.jpg", b"i"), ("a.txt", b"cat")])
    for name in ("0003.tar", "0006.tar"):
        (folder / name).unlink()
    index_folder(folder)
    assert "classes" not in read_columns(folder / COLUMNS_FILE).arrays
    assert open_folder(folder).classes.tolist() == [-1]


def test_an_index_that_another_process_wrote_is_noticed(folder: Path) -> None:
    summary = index_folder(folder)
    entries = list(read_list(folder)[1].values())
    shard_index_path(folder, "0003.tar").write_bytes(shard_index_path(folder, "0000.tar").read_bytes())
    with pytest.raises(UserError, match=r"0003\.tar\.idx does not match its shard"):
        write_folder_index(folder, tuple(summary.choices), entries)


KEYS = st.sampled_from(["a", "b", "d/a"])
EXTENSIONS = st.sampled_from(["jpg", "png", "txt", "json", "cls", "syn.json", "JPG"])


@given(st.lists(st.tuples(KEYS, EXTENSIONS, st.binary(max_size=6), st.booleans()), max_size=25))
def test_every_run_of_members_is_counted_once(members: list[tuple[str, str, bytes, bool]]) -> None:
    runs, last, seen = 0, "", set()
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for key, extension, data, link in members:
            if key != last or extension.lower() in seen or not seen:
                runs, last, seen = runs + 1, key, set()
            seen.add(extension.lower())
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.type, info.size = (tarfile.SYMTYPE, 0) if link else (tarfile.REGTYPE, len(data))
            tar.addfile(info, io.BytesIO(data))
    with tempfile.NamedTemporaryFile(suffix=".tar") as place:
        Path(place.name).write_bytes(file.getvalue())
        columns, without_image, duplicates, broken = scan_shard(Path(place.name), ("default", SYNTHETIC))
    assert broken is None
    assert len(columns["offset"]) + without_image + duplicates == runs
    assert len(columns["offset"]) <= 3


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=4), st.data())
def test_columns_concatenated_behave_as_one_array(
    shapes: list[tuple[int, bool]], data: st.DataObject
) -> None:
    pieces = [np.arange(size).astype(np.int32 if wide else np.uint8) for size, wide in shapes]
    whole, joined = np.concatenate(pieces), Concatenated(pieces)
    assert len(joined) == len(whole)
    assert joined.dtype == whole.dtype
    start, stop = data.draw(st.integers(-12, 25)), data.draw(st.integers(-12, 25))
    np.testing.assert_array_equal(joined[start:stop], whole[start:stop])
    np.testing.assert_array_equal(np.asarray(joined), whole)
    if len(whole):
        numbers = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=8)), np.int64)
        np.testing.assert_array_equal(joined[numbers], whole[numbers])
        assert joined[int(len(whole) - 1)] == whole[-1]
    with pytest.raises(IndexError):
        joined[len(whole)]
