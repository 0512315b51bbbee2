"""`shards reshard`: the samples asked for, byte for byte, whatever the workers."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from clipcluster.data.shards.indexing import index_folder
from clipcluster.data.shards.open import open_folder
from clipcluster.errors import UserError
from tools.convert.convert import convert
from tools.convert.plan import Settings
from tools.convert.readers.digits import png
from tools.convert.readers.shards import Options, index_as_before
from tools.shards.verify import verify

Tar = dict[str, list[tuple[str, bytes]]]


def _tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 7.5
            tar.addfile(info, io.BytesIO(data))


def _image(number: int) -> bytes:
    return png(np.full((4 + number % 5, 4), number % 250))


def _members(number: int) -> list[tuple[str, bytes]]:
    """A sample as DataCompDR has them, with members in an order of its own and a name in capitals."""
    key = f"deep/é{number:03d}"
    text = [("txt", b"caption %d" % number)] if number % 4 else []
    members = [("url.txt", b"http://x"), *text, ("PNG", _image(number)), ("npz", bytes([number]) * 700),
               ("syn.json", b'{"syn_text": ["a",  "b"]}'), ("cls", b"%d" % (number % 3))]  # fmt: skip
    return [(f"{key}.{extension}", data) for extension, data in members]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """25 samples in three tars of another program, one member that belongs to no sample."""
    folder = tmp_path / "in"
    folder.mkdir()
    for shard, numbers in enumerate((range(10), range(10, 18), range(18, 25))):
        members = [member for number in numbers for member in _members(number)]
        _tar(folder / f"{shard}.tar", [("README", b"hello"), *members])
    (folder / "classnames.txt").write_text("a\nb\nc\n")
    index_folder(folder, None, ["default", "syn.json:syn_text"])
    return folder


def _samples(folder: Path) -> list[list[tuple[str, bytes]]]:
    """Members of every sample in the order of the tars, by Python's tarfile."""
    samples: dict[str, list[tuple[str, bytes]]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key = info.name.partition(".")[0]
                samples.setdefault(key, []).append((info.name, tar.extractfile(info).read()))  # type: ignore[union-attr]
    return list(samples.values())


def _reshard(
    folders: list[Path], out: Path, workers: int = 1, **options: object
) -> list[list[tuple[str, bytes]]]:
    convert(
        "shards",
        out,
        folders,
        Options(**options),
        Settings(samples_per_shard=4),
        workers=workers,  # type: ignore[arg-type]
    )
    assert verify(out, images=False).whole
    return _samples(out)


def test_every_member_goes_over_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    assert _reshard([folder], tmp_path / "out") == [_members(number) for number in range(25)]
    assert len(list((tmp_path / "out").glob("*.tar"))) == 7
    assert (tmp_path / "out" / "classnames.txt").read_text() == "a\nb\nc\n"
    index_as_before([folder], tmp_path / "out")
    old, new = (open_folder(f, captions_in="syn.json:syn_text") for f in (folder, tmp_path / "out"))
    assert [old.read(p)[0::2] for p in range(25)] == [new.read(p)[0::2] for p in range(25)]
    assert [old.read(p)[3:] for p in range(25)] == [new.read(p)[3:] for p in range(25)]


def test_the_workers_do_not_matter(folder: Path, tmp_path: Path) -> None:
    for out, workers in (("one", 1), ("two", 2)):
        _reshard([folder], tmp_path / out, workers, fraction=0.7, dedupe=True)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / out).glob("*.tar")} for out in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"first": 7}, list(range(7))),
        ({"has_caption": True}, [n for n in range(25) if n % 4]),
        ({"classes": (0, 2)}, [n for n in range(25) if n % 3 != 1]),
        ({"kinds": ("gif,png",)}, list(range(25))),
        ({"min_side": 4, "max_aspect": 1.5}, [n for n in range(25) if n % 5 < 3]),
        ({"classes": (1,), "first": 2}, [1, 4]),
    ],
)
def test_conditions(folder: Path, tmp_path: Path, options: dict[str, object], wanted: list[int]) -> None:
    assert _reshard([folder], tmp_path / "out", **options) == [_members(number) for number in wanted]


def test_keys_of_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("deep/é013\n\n deep/é002 \n", encoding="utf-8")
    found = _reshard([folder], tmp_path / "out", samples=tmp_path / "keys")
    assert found == [_members(2), _members(13)]
    (tmp_path / "keys").write_text("deep/é013\nnowhere\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"1 of its 2 keys .*nowhere"):
        _reshard([folder], tmp_path / "out2", samples=tmp_path / "keys")


def test_a_share_depends_on_seed_and_keys_alone(folder: Path, tmp_path: Path) -> None:
    found = _reshard([folder], tmp_path / "a", fraction=0.4)
    assert len(found) == 10
    _reshard([folder], tmp_path / "cut")
    assert _reshard([tmp_path / "cut"], tmp_path / "b", fraction=0.4) == found
    assert _reshard([folder], tmp_path / "c", fraction=0.4, seed=1) != found


def test_folders_together(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    # the same keys, half of the images the same
    _tar(
        other / "0.tar",
        [
            (name, _image(99) if n % 2 and name.endswith("PNG") else data)
            for n in range(6)
            for name, data in _members(n)
        ],
    )
    index_folder(other)
    assert len(_reshard([folder, other], tmp_path / "keys")) == 25
    bad = [json.loads(line) for line in (tmp_path / "keys" / "bad_samples.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in bad] == ["duplicate key"] * 6
    found = _reshard([folder, other], tmp_path / "prefix", prefix=True)
    assert len(found) == 31
    assert [sample[0][0] for sample in (found[0], found[25])] == [
        "in/deep/é000.url.txt",
        "other/deep/é000.url.txt",
    ]
    assert not (tmp_path / "prefix" / "classnames.txt").exists()
    assert len(_reshard([folder, other], tmp_path / "content", prefix=True, dedupe=True)) == 26
    (other / "classnames.txt").write_text("z\n")
    with pytest.raises(UserError, match="other class names"):
        _reshard([folder, other], tmp_path / "classes")


def test_bad_images_are_left_out_and_listed(folder: Path, tmp_path: Path) -> None:
    members = [
        (name, data[:-20] if name == "deep/é003.PNG" else data)
        for n in range(6)
        for name, data in _members(n)
    ]
    _tar(folder / "3.tar", [(f"x{name}", data) for name, data in members])
    index_folder(folder)
    assert len(_reshard([folder], tmp_path / "out", drop_bad=True)) == 30
    (line,) = (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "xdeep/é003"
    assert "PNG" in json.loads(line)["reason"]


def test_what_is_no_sample_is_said(folder: Path, tmp_path: Path) -> None:
    _tar(folder / "3.tar", [*_members(90), ("a.txt", b"no image"), *_members(91), *_members(90)])
    index_folder(folder)
    done = convert("shards", tmp_path / "out", [folder], Options())
    assert done.notes == [
        f"{folder}: left behind: 1 without an image, 1 whose key came before in their shard"
    ]
    assert len(_samples(tmp_path / "out")) == 27


def test_another_condition_is_refused_and_a_changed_shard_too(folder: Path, tmp_path: Path) -> None:
    _reshard([folder], tmp_path / "out", first=3)
    with pytest.raises(UserError, match="--first was 3, is 4"):
        _reshard([folder], tmp_path / "out", first=4)
    _tar(folder / "1.tar", _members(11))
    with pytest.raises(UserError, match=r"1\.tar changed since it was indexed"):
        _reshard([folder], tmp_path / "out2")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"fraction": 0}, "--fraction 0"),
        ({"first": 0}, "--first 0"),
        ({"min_side": -1}, "--min-side -1"),
        ({"max_aspect": 0.5}, "--max-aspect 0.5"),
        ({"classes": (9,)}, "no sample meets these conditions"),
        ({"samples": Path("nowhere.txt")}, "nowhere.txt"),
    ],
)
def test_wrong_input(folder: Path, tmp_path: Path, options: dict[str, object], part: str) -> None:
    with pytest.raises(UserError, match=part):
        _reshard([folder], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
