"""`convert csv`: rows into samples, none of them lost to quotes, gaps or a wrong line."""

import csv
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.errors import UserError
from tools.convert.convert import convert
from tools.convert.readers.table import KIND, Options, grouped
from tools.convert.readers.table_rows import Table
from tools.convert.records import BadRecord, InputFile, Record, Source, Split


@pytest.fixture
def images(tmp_path: Path, picture: Any) -> dict[str, bytes]:
    """Five images in a folder `images` beside the tables, by the path in them."""
    (tmp_path / "images").mkdir()
    made = {f"images/{name}.jpg": picture(number) for number, name in enumerate("abcde")}
    for path, data in made.items():
        (tmp_path / path).write_bytes(data)
    return made


def _open(*inputs: Path | str, **options: Any) -> Source:
    return KIND.open([Path(path) for path in inputs], Options(**options))


def _all(source: Source, split: int = 0) -> list[Record | str]:
    """Every sample, or the reason why it is bad."""
    found: list[Record | str] = []
    for number in range(len(source.splits[split])):
        try:
            found.append(source.splits[split].read(number))
        except BadRecord as bad:
            found.append(bad.reason if bad.key == f"{number:09d}" else f"not with this key: {bad.key}")
    return found


def _write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_rows_of_one_image_are_one_sample(tmp_path: Path, images: dict[str, bytes]) -> None:
    table = _write(
        tmp_path / "train.tsv",
        "filepath\ttitle\tsource\tscore\n"
        "images/b.jpg\tNone\tweb\t1\n"
        "images/a.jpg\tA dog, running. \tweb\t2\n"
        "./images/b.jpg\tnull\tweb\t3\n"
        "images/c.jpg\t\tbook\t4\n"
        "\n"
        'images//b.jpg\t"tab\tand ""quotes""\nand lines"\tweb\t5\r\n'
        "images/a.jpg\t \tweb\t2",
    )
    source = _open(table)
    b, a, c = _all(source)
    assert isinstance(a, Record)
    assert isinstance(b, Record)
    assert isinstance(c, Record)
    assert b.captions == ["None", "null", 'tab\tand "quotes"\nand lines']
    assert a.captions == ["A dog, running. "]
    assert c.captions == []
    assert [b.image, a.image, c.image] == [images[f"images/{name}.jpg"] for name in "bac"]
    assert [b.key, a.key, c.key] == ["000000000", "000000001", "000000002"]
    assert a.fields == {"filepath": "images/a.jpg", "source": "web", "score": "2"}
    assert b.fields["score"] == ["1", "3", "5"]
    assert b.fields["source"] == "web"
    assert source.splits[0].name == ""
    assert source.splits[0].sizes().tolist() == [len(b.image), len(a.image), len(c.image)]
    assert source.inputs[0] == InputFile.of(table)
    os.utime(tmp_path / "images/c.jpg", ns=(1, 1))
    assert _open(table).inputs[1] != source.inputs[1]
    assert source.notes == []


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv", "pairs.txt", "pairs"])
@pytest.mark.parametrize("separator", [",", "\t"])
def test_the_separator_is_that_of_the_first_line(
    tmp_path: Path, images: dict[str, bytes], name: str, separator: str
) -> None:
    rows = [("filepath", "title"), ("images/a.jpg", "a cat; a dog")]
    table = _write(tmp_path / name, "\ufeff" + "".join(separator.join(row) + "\r\n" for row in rows))
    (record,) = _all(_open(table))
    assert isinstance(record, Record)
    assert record.captions == ["a cat; a dog"]


@pytest.mark.parametrize("separator", [";", "semicolon"])
def test_columns_separator_and_root_may_be_given(
    tmp_path: Path, images: dict[str, bytes], separator: str
) -> None:
    (tmp_path / "tables").mkdir()
    table = _write(tmp_path / "tables" / "x.csv", "text,s;file\na dog, a cat;images/a.jpg\n")
    options = {"image_column": "file", "caption_column": "text,s", "separator": separator}
    (record,) = _all(_open(table, root=tmp_path, **options))
    assert isinstance(record, Record)
    assert (record.captions, record.fields) == (["a dog, a cat"], {"file": "images/a.jpg"})
    absolute = _write(tmp_path / "tables" / "y.csv", f"text,s;file\nx;{tmp_path}/images/a.jpg\n")
    (record,) = _all(_open(absolute, **options))
    assert isinstance(record, Record)
    with pytest.raises(
        UserError, match=r"none of the first 1 images is there, such as .*/tables/images/a.jpg"
    ):
        _open(table, **options)


@pytest.mark.parametrize("header", ["image_path,caption", "path,text", "filepath,caption", "image,title"])
def test_usual_column_names_are_found(tmp_path: Path, images: dict[str, bytes], header: str) -> None:
    table = _write(tmp_path / "x.csv", f"{header}\nimages/a.jpg,a cat\n")
    (record,) = _all(_open(table))
    assert isinstance(record, Record)
    assert record.captions == ["a cat"]


def test_every_row_and_image_is_accounted_for(tmp_path: Path, images: dict[str, bytes]) -> None:
    table = _write(
        tmp_path / "x.csv",
        b"filepath,title\nimages/a.jpg,good\nimages/a.jpg,\nimages/none.jpg,lost\nimages/none.jpg,too\n"
        b"images/b.jpg,too,many\nimages/c.jpg,fine\nimages/a.jpg,good\n",
    )
    done = convert("csv", tmp_path / "out", [table])
    account = dict(done.accounts["."])
    assert account == {
        "rows": 7,
        "  not usable": 1,
        "  of images left out": 2,
        "  with an empty caption": 1,
        "  captions written": 3,
        "images": 3,
        "  left out (no file, no image)": 1,
        "  written": 2,
    }
    assert done.splits["."].captions == 3
    assert done.splits["."].samples == 2
    assert convert("csv", tmp_path / "out", [table]).accounts == {}


def test_bad_rows_are_samples_of_their_own(tmp_path: Path, images: dict[str, bytes]) -> None:
    table = _write(
        tmp_path / "x.csv",
        b"filepath,title\n"
        b"images/a.jpg,good\n"
        b"images/a.jpg,caf\xe9\n"
        b"images/nothing.jpg,of nothing\n"
        b"images/b.jpg,too,many\n"
        b"images/b.jpg\n"
        b",of no image\n"
        b"images,of a folder\n"
        b"images/a.jpg,good again\n",
    )
    source = _open(table)
    found = _all(source)
    assert isinstance(found[0], Record)
    assert found[0].captions == ["good", "good again"]
    assert found[1:] == [
        "x.csv, line 3: not UTF-8",
        f"x.csv, line 4: {tmp_path}/images/nothing.jpg: No such file or directory",
        "x.csv, line 5: 3 cells where there are 2 columns",
        "x.csv, line 6: 1 cells where there are 2 columns",
        "x.csv, line 7: names no image",
        f"x.csv, line 8: {tmp_path}/images: Is a directory",
    ]
    assert source.splits[0].sizes().tolist() == [len(images["images/a.jpg"]), 0, 0, 0, 0, 0, 0]
    assert source.notes == ["4 rows cannot be used; the first: x.csv, line 3: not UTF-8"]


@pytest.mark.parametrize(
    ("rows", "good", "faults"),
    [
        (['a\t"never closed', "b\tfine", "c\tfine"], "bc", {2: "never closed"}),
        (['a\t"closed by another', "b\tswallowed", 'c\tends in 12"', "d\tfine"], "bcd", {2: "line 3, which"}),
        (['a\t"closed by another', 'b\t"swallowed too"', "c\tfine"], "bc", {2: "never closed"}),
        (['a\t"Stop" it says', "b\tfine"], "b", {2: "never closed, or"}),
        (['"a\tquote before the path', "b\tfine", 'c\t"'], "b", {2: "line 3, which", 4: "never closed"}),
        (["a\tfine", 'b\t"last'], "a", {3: "never closed"}),
    ],
)
def test_no_quote_swallows_a_row(
    tmp_path: Path, images: dict[str, bytes], rows: list[str], good: str, faults: dict[int, str]
) -> None:
    lines = [row.replace(row.lstrip('"')[0], f"images/{row.lstrip(chr(34))[0]}.jpg", 1) for row in rows]
    table = _write(tmp_path / "x.tsv", "\n".join(["filepath\ttitle", *lines]) + "\n")
    found = _all(_open(table))
    records = [record for record in found if isinstance(record, Record)]
    reasons = [reason for reason in found if isinstance(reason, str)]
    assert [record.fields["filepath"][7] for record in records] == list(good)
    assert len(reasons) == len(faults)
    for reason, (line, words) in zip(reasons, faults.items(), strict=True):
        assert reason.startswith(f"x.tsv, line {line}: ")
        assert words in reason
    assert "give --no-quotes" in _open(table).notes[0]
    literal = _all(_open(table, quotes=False))
    if not lines[0].startswith('"'):
        assert [record.captions[0] for record in literal if isinstance(record, Record)] == [
            line.split("\t")[1] for line in lines
        ]


def test_a_multi_line_caption_that_looks_like_rows_is_a_caption(
    tmp_path: Path, images: dict[str, bytes]
) -> None:
    table = _write(tmp_path / "x.csv", 'filepath,title\nimages/a.jpg,"a dog,\nrunning, fast\nhome"\n')
    (record,) = _all(_open(table))
    assert isinstance(record, Record)
    assert record.captions == ["a dog,\nrunning, fast\nhome"]


def test_classes(tmp_path: Path, images: dict[str, bytes]) -> None:
    table = _write(
        tmp_path / "x.csv",
        "filepath,title,label\nimages/a.jpg,x,7\nimages/b.jpg,x,\nimages/c.jpg,x,cat\nimages/d.jpg,x,1\n"
        "images/d.jpg,x,2\nimages/e.jpg,x,03\nimages/e.jpg,y,3\n",
    )
    a, b, c, d, e = _all(_open(table, class_column="label"))
    assert [record.cls for record in (a, b, e) if isinstance(record, Record)] == [7, None, 3]
    assert c == "x.csv, line 4: label 'cat' is not a class number"
    assert d == "x.csv, line 5: of several classes: 1, 2"
    assert isinstance(a, Record)
    assert a.fields == {"filepath": "images/a.jpg"}


def test_several_tables_are_one_split_or_named_ones(tmp_path: Path, images: dict[str, bytes]) -> None:
    one = _write(tmp_path / "one.tsv", "filepath\ttitle\nimages/a.jpg\t1\nimages/b.jpg\t2\n")
    two = _write(tmp_path / "two.csv", "title,filepath,more\n3,images/b.jpg,x\n4,images/c.jpg,y\n")
    source = _open(one, two)
    records = [record for record in _all(source) if isinstance(record, Record)]
    assert [record.captions for record in records] == [["1"], ["2", "3"], ["4"]]
    assert records[1].fields == {"filepath": "images/b.jpg", "more": ["", "x"]}
    assert source.inputs[:2] == [InputFile.of(one), InputFile.of(two)]
    named = _open(f"train={one}", f"val={two}")
    assert [(split.name, len(split)) for split in named.splits] == [("train", 2), ("val", 2)]
    with pytest.raises(UserError, match=r"FILE …, .*NAME=FILE …, .*not both"):
        _open(f"train={one}", two)
    odd = _write(tmp_path / "a=b.tsv", one.read_text())
    assert len(_open(odd).splits[0]) == 2


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", {}, "first line names no columns"),
        (
            "picture,words\nx,y\n",
            {},
            "no column 'filepath' or 'title', but: 'picture', 'words'; name the columns with "
            "--image-column NAME and --caption-column NAME",
        ),
        ("filepath,words\nx,y\n", {}, "no column 'title'.*--caption-column"),
        ("filepath,title\nx,y\n", {"class_column": "cls"}, "no column 'cls'.*--class-column"),
        ("filepath,title,title\nx,y,z\n", {}, "'title' is named twice"),
        ("filepath,title,captions\nx,y,z\n", {}, "'captions' would take the place"),
        ("filepath,title\nx,y\n", {"separator": "tabs"}, "--separator 'tabs': give one character, or tab"),
        ("filepath,title\nx,y\n", {"separator": '"'}, "--separator"),
        ("filepath,title\nx,y\n", {"root": Path("/nowhere")}, "--root /nowhere: no such folder"),
        ('filepath,"title\nx,y\n', {}, "line 1: no header line"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, text: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _open(_write(tmp_path / "x.csv", text), **options)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        _open(tmp_path / "nothing.csv")
    with pytest.raises(UserError, match="looks like UTF-16"):
        _open(_write(tmp_path / "x.csv", "filepath,title\n".encode("utf-16")))
    with pytest.raises(UserError, match="takes FILE"):
        _open()


_CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@given(
    rows=st.lists(st.tuples(_CELL, _CELL), max_size=8), separator=st.sampled_from(",\t;"), end=st.booleans()
)
def test_what_the_csv_module_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], separator: str, end: bool
) -> None:
    text = io.StringIO()
    form = {"lineterminator": "\r\n"} if end else {"lineterminator": "\n", "quoting": csv.QUOTE_ALL}
    writer = csv.writer(text, delimiter=separator, **form)  # type: ignore[arg-type]
    writer.writerows([("one", "two"), *rows])
    path = _write(tmp_path_factory.getbasetemp() / "x.csv", text.getvalue())
    table = Table(path, separator, True)
    found = list(table.rows(lambda cells: False))
    assert [(row.cells, row.fault) for row in found] == [(list(row), "") for row in rows]
    data = path.read_bytes()
    for row in found:
        assert table.cells(data[row.offset : row.offset + row.size]) == row.cells
        assert data[: row.offset].count(b"\n") == row.line - 1


@given(data=st.binary(max_size=200).map(lambda data: data.replace(b"\0", b'"')))
def test_every_line_of_any_bytes_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = _write(tmp_path_factory.getbasetemp() / "x.csv", b"one,two\n" + data)
    rows = list(Table(path, ",", True).rows(lambda cells: False))
    ends = [8, *(row.offset + row.size for row in rows)]
    for before, row in zip(ends, rows, strict=False):
        assert row.size > 0
        assert set(path.read_bytes()[before : row.offset]) <= set(b"\r\n")
    assert set(path.read_bytes()[ends[-1] :]) <= set(b"\r\n")


@given(names=st.lists(st.integers(0, 5), max_size=30))
def test_groups_go_by_their_first_row(names: list[int]) -> None:
    order, ends = grouped(np.array(names, np.int64))
    groups = [part.tolist() for part in np.split(order, ends)[:-1]]
    assert groups == [
        [at for at, other in enumerate(names) if other == name] for name in dict.fromkeys(names)
    ]


def _key_and_bytes(split: Split, number: int) -> tuple[str, bytes]:
    record = split.read(number)
    return record.key, record.image


def test_read_from_other_processes(tmp_path: Path, images: dict[str, bytes], in_others: Any) -> None:
    table = _write(tmp_path / "x.csv", "filepath,title\n" + "".join(f"{path},x\n" for path in images))
    (split,) = _open(table).splits
    here = [_key_and_bytes(split, number) for number in range(5)]  # type: ignore[arg-type]
    assert in_others(_key_and_bytes, split, range(5)) == here
    assert [data for _, data in here] == list(images.values())
