"""Published data through the converter: every record arrives, the same bytes whatever the workers."""

import json
from pathlib import Path
from typing import Any

import pytest

from clipcluster.data.shards.open import open_folder
from clipcluster.errors import UserError
from tools.convert.convert import Settings, convert, kind_named
from tools.convert.records import BadRecord, Record


@pytest.fixture(params=["coco", "csv", "chinese-clip", "lmdb"])
def source(request: pytest.FixtureRequest, tmp_path: Path, picture: Any) -> tuple[str, Path]:
    """A kind, and an input for it."""
    folder, kind = tmp_path / "in", str(request.param)
    if kind == "coco":
        return kind, request.getfixturevalue("coco").zips(folder)
    if kind == "csv":
        folder.mkdir()
        rows = ["filepath,title"]
        for number in range(7):
            rows += [f"{number}.png,text {text} of {number}" for text in range(number)]
            (folder / f"{number}.png").write_bytes(picture(number, "PNG") if number != 3 else b"<html>")
        (folder / "x.csv").write_text("\n".join([*rows, "9.png,of nothing", "1.png,with,three cells"]))
        return kind, folder / "x.csv"
    data = request.getfixturevalue("chinese_clip")
    return kind, data.files(folder, "train") if kind == "chinese-clip" else data.lmdb(folder, "train")


def _bytes(folder: Path) -> dict[str, bytes]:
    """What does not hold times."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in _WITH_TIMES]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


_WITH_TIMES = ("index.json", "index.bin", "conversion.json")


def test_every_record_arrives_whatever_the_workers(source: tuple[str, Path], tmp_path: Path) -> None:
    kind, given = source
    settings = Settings(samples_per_shard=2)
    for workers in (1, 3):
        convert(kind, tmp_path / str(workers), [given], settings=settings, workers=workers)
    assert _bytes(tmp_path / "1") == _bytes(tmp_path / "3")
    reader = kind_named(kind)
    for split in reader.open([given], reader.options()).splits:
        shards = open_folder(tmp_path / "1" / split.name)
        wanted: list[Record] = []
        bad: list[tuple[str, str]] = []
        for number in range(len(split)):
            try:
                record = split.read(number)
                if record.image.startswith(b"<html"):
                    raise BadRecord(record.key, "HTML")
                wanted.append(record)
            except BadRecord as error:
                bad.append((error.key, error.reason))
        samples = [shards.read(position) for position in range(shards.n_samples)]
        assert [(sample.key, sample.image) for sample in samples] == [(r.key, r.image) for r in wanted]
        assert [sample.captions for sample in samples] == [list(record.captions) for record in wanted]
        listed = tmp_path / "1" / split.name / "bad_samples.jsonl"
        lines = [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []
        assert [line["key"] for line in lines] == [key for key, _ in bad]
        assert all(reason in ("HTML", line["reason"]) for line, (_, reason) in zip(lines, bad, strict=True))


def test_a_changed_input_is_refused_by_name(
    tmp_path: Path, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(picture(number, "PNG"))
    (tmp_path / "x.csv").write_text("filepath,title\n0.png,a\n1.png,b\n")
    out = tmp_path / "out"
    assert convert("csv", out, [tmp_path / "x.csv"]).made
    monkeypatch.chdir(tmp_path)
    assert not convert("csv", out, [Path("x.csv")]).made  # the same, otherwise named
    (tmp_path / "1.png").write_bytes(picture(9, "PNG"))
    with pytest.raises(UserError, match="images of the table was changed"):
        convert("csv", out, [tmp_path / "x.csv"])
