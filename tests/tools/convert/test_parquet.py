"""`convert parquet`: img2dataset's output of parquet, Hugging Face's image columns, columns of paths."""

import datetime
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipcluster.data.shards.open import open_folder
from clipcluster.errors import UserError
from tools.convert.readers import parquet
from tools.convert.readers.parquet import Options, open_rows
from tools.convert.records import BadRecord, Record, Source, Split


def _picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((10, 12, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def _write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None, group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)
    return path


def _open(*inputs: Path, **options: Any) -> Source:
    return open_rows(list(inputs), Options(**options))


def _records(source: Source, split: int = 0) -> list[Record]:
    return [source.splits[split].read(number) for number in range(len(source.splits[split]))]


def _downloads(folder: Path) -> Path:
    """As img2dataset's output_format=parquet: failures too, the image column named by the encode format."""
    schema = pa.schema(
        [
            *[(name, pa.string()) for name in ("uid", "caption", "url", "key", "status", "error_message")],
            ("width", pa.int32()),
            ("jpg", pa.binary()),
        ]
    )
    for shard in range(2):
        rows = []
        for row in range(6):
            number, good = 6 * shard + row, row != 4
            rows.append(
                {
                    "uid": f"{number:032x}",
                    "caption": None if row == 2 else f"caption {number}",
                    "url": f"http://127.0.0.1/{number}",
                    "key": f"{shard:05d}{row:04d}",
                    "status": "success" if good else "failed_to_download",
                    "error_message": None if good else "HTTP Error 404: Not Found",
                    "width": 12 if good else None,
                    "jpg": _picture(number) if good else None,
                }
            )
        _write(folder / f"{shard:05d}.parquet", rows, schema)
    return folder


def test_img2datasets_output_of_parquet(tmp_path: Path) -> None:
    source = _open(_downloads(tmp_path), key_column="key")
    (split,) = source.splits
    assert (split.name, len(split), source.notes) == ("", 12, [])
    for number in (0, 5, 11, 2):
        record = split.read(number)
        assert (record.key, record.image) == (f"{number // 6:05d}{number % 6:04d}", _picture(number))
        assert record.captions == ([] if number % 6 == 2 else [f"caption {number}"])
        assert record.fields["uid"] == f"{number:032x}"
        assert record.fields["status"] == "success"
        assert not {"jpg", "caption"} & set(record.fields)
    with pytest.raises(
        BadRecord, match="no image in its row: failed_to_download, HTTP Error 404: Not Found"
    ) as bad:
        split.read(10)
    assert bad.value.key == "000010004"


def _hub(path: Path, rows: int, begin: int = 0) -> Path:
    """As datasets.push_to_hub writes: a struct of bytes and path, ClassLabel names in the metadata."""
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": ["cat", "dog ", "sea lion"]},
        "captions": {"_type": "List"},
    }
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
            ("captions", pa.list_(pa.string())),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    records = [
        {
            "image": {"bytes": _picture(number), "path": f"{number}.png"},
            "label": number % 3 if number != 1 else -1,
            "captions": [f"first of {number}", " ", f"second of {number}"],
        }
        for number in range(begin, begin + rows)
    ]
    return _write(path, records, schema)


def test_hugging_face_images_classes_and_splits(tmp_path: Path) -> None:
    _hub(tmp_path / "data" / "train-00000-of-00002.parquet", 5)
    _hub(tmp_path / "data" / "train-00001-of-00002-0a1b2c3d.parquet", 5, 5)
    _hub(tmp_path / "data" / "test-00000-of-00001.parquet", 3, 10)
    source = _open(tmp_path)
    assert [(split.name, len(split)) for split in source.splits] == [("test", 3), ("train", 10)]
    train = _records(source, 1)
    assert [record.image for record in train] == [_picture(number) for number in range(10)]
    assert train[3].captions == ["first of 3", "second of 3"]
    assert [record.cls for record in train] == [0, None, 2, 0, 1, 2, 0, 1, 2, 0]
    assert [record.key for record in train] == [f"{number:09d}" for number in range(10)]
    assert train[0].fields == {}
    assert source.splits[0].files == {"classnames.txt": "cat\ndog\nsea lion\n"}
    one = _open(tmp_path / "data" / "test-00000-of-00001.parquet")
    assert [split.name for split in one.splits] == [""]


def test_the_command_makes_a_folder_a_split(tmp_path: Path) -> None:
    _hub(tmp_path / "data" / "train-00000-of-00001.parquet", 5)
    _hub(tmp_path / "data" / "test-00000-of-00001.parquet", 3, 10)
    command = [sys.executable, "-m", "jobs.cli", "shards", "convert", "parquet", str(tmp_path / "data")]
    subprocess.run([*command, "--out", str(tmp_path / "out"), "--workers", "2"], check=True)
    train = open_folder(tmp_path / "out" / "train")
    assert (train.n_samples, train.n_pairs) == (5, 10)
    assert train.read(4).captions == ["first of 4", "second of 4"]
    assert train.classnames == ["cat", "dog", "sea lion"]
    assert [train.read(number).cls for number in range(3)] == [0, -1, 2]
    assert open_folder(tmp_path / "out" / "test").read(2).image == _picture(12)


def test_images_behind_paths(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(_picture(number))
    rows = [{"image_path": f"images/{number}.png", "title": f"words {number}"} for number in range(4)]
    rows.append({"image_path": None, "title": "none"})
    rows.append({"image_path": str(tmp_path / "images" / "2.png"), "title": "absolute"})
    rows.append({"image_path": "x" * 300, "title": "longer than a file's name may be"})
    rows.append({"image_path": "a\0b", "title": "what no file is called"})
    file = _write(tmp_path / "a" / "list.parquet", rows)
    (split,) = _open(file, root=tmp_path).splits
    assert [split.read(number).image for number in (0, 1, 2, 5)] == [_picture(n) for n in (0, 1, 2, 2)]
    assert split.read(1).captions == ["words 1"]
    assert split.sizes().tolist() == [*[len(_picture(n)) for n in range(3)], 0, 0, len(_picture(2)), 0, 0]
    with pytest.raises(BadRecord, match=r"images/3.png: No such file"):
        split.read(3)
    with pytest.raises(BadRecord, match="no image in its row"):
        split.read(4)
    with pytest.raises(BadRecord, match="File name too long"):
        split.read(6)
    with pytest.raises(BadRecord, match="null byte"):
        split.read(7)
    beside = _write(tmp_path / "list.parquet", rows)
    assert _open(beside).splits[0].read(0).image == _picture(0)


def test_a_struct_without_bytes_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(_picture(9))
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    file = _write(tmp_path / "x.parquet", [{"image": {"bytes": None, "path": "x.png"}}], schema)
    source = _open(file)
    assert _records(source)[0].image == _picture(9)
    assert source.notes == ["no column of captions among image"]


def test_several_caption_columns_and_other_fields(tmp_path: Path) -> None:
    rows = [
        {
            "png": _picture(0),
            "mask": b"\x01",
            "alt": "one",
            "more": ["two", "three"],
            "score": float("nan"),
            "when": datetime.datetime(2026, 1, 2, 3, 4, 5),
            "boxes": [[0.5, 1.0]],
            "id.x": 7,
        }
    ]
    file = _write(tmp_path / "x.parquet", rows)
    with pytest.raises(UserError, match=r"several columns of bytes \(png, mask\); name it with --image"):
        _open(file)
    source = _open(file, image_column="png", caption_column=("more", "alt"), key_column="id.x")
    (record,) = _records(source)
    assert record.captions == ["two", "three", "one"]
    assert (record.key, record.cls) == ("7", None)
    assert record.fields == {"score": None, "when": "2026-01-02T03:04:05", "boxes": [[0.5, 1.0]], "id.x": 7}
    json.dumps(record.fields, allow_nan=False)
    assert source.notes == ["columns that are not taken: mask"]
    assert _records(_open(file, image_column="png", json_column=("boxes",)))[0].fields == {
        "boxes": [[0.5, 1.0]]
    }
    assert _records(_open(file, image_column="png", json_column=("-",)))[0].fields == {}


def test_keys_are_fit_for_members_and_unique(tmp_path: Path) -> None:
    file = _write(tmp_path / "x.parquet", [{"png": _picture(n), "name": f"a.b/c.{n}.png"} for n in range(6)])
    assert [record.key for record in _records(_open(file, key_column="name"))] == [
        f"a.b/c_{n}_png" for n in range(6)
    ]
    for names, words in (
        (["a.b", "a_b"], "'a_b' of row 1 is also that of row 0"),
        (["", "a"], "row 0 is empty"),
    ):
        twice = _write(tmp_path / "y.parquet", [{"png": _picture(0), "name": name} for name in names])
        with pytest.raises(UserError, match=words):
            _open(twice, key_column="name")


def test_row_groups_are_read_once_in_order_and_any_process_reads_any_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_others: Any
) -> None:
    (split,) = _open(_downloads(tmp_path), key_column="key").splits
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counted(self: Any, number: int, **options: Any) -> Any:
        read.append(number)
        return original(self, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    good = [number for number in range(12) if number % 6 != 4]
    expected = [split.read(number).key for number in good]
    assert read == [0, 1, 0, 1]  # two files of two groups each
    monkeypatch.setattr(parquet, "CACHED_BYTES", 1)
    (split,) = _open(tmp_path, key_column="key").splits
    read.clear()
    for number in (0, 5, 3):
        split.read(number)
    assert read == [0, 1, 0]
    monkeypatch.undo()
    assert in_others(_key, split, good) == expected


def _key(split: Split, number: int) -> str:
    return split.read(number).key


def test_sizes_come_from_the_footers(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    rows = [{"jpg": noise.bytes(20_000), "text": "x"} for _ in range(10)]
    sizes = _open(_write(tmp_path / "x.parquet", rows)).splits[0].sizes()
    assert sizes.shape == (10,)
    assert sizes.sum() == pytest.approx(200_000, rel=0.01)


def test_what_is_no_such_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no parquet at all")
    (tmp_path / "footer.parquet").write_bytes(b"PAR1" + b"\xff" * 20 + (20).to_bytes(4, "little") + b"PAR1")
    (tmp_path / "empty").mkdir()
    words = _write(tmp_path / "words.parquet", [{"text": "words"}])
    file = _write(tmp_path / "x.parquet", [{"png": _picture(0), "score": 0.5, "text": "words"}])
    other = _write(tmp_path / "z.parquet", [{"jpg": _picture(0)}])
    none = _write(tmp_path / "none.parquet", [], pa.schema([("png", pa.binary())]))
    for inputs, options, message in (
        ([tmp_path / "text.parquet"], {}, "not a readable parquet file"),
        ([tmp_path / "footer.parquet"], {}, "not a readable parquet file"),
        ([tmp_path / "nowhere"], {}, "no such file or folder"),
        ([tmp_path / "empty"], {}, "no .parquet in this folder"),
        ([words], {}, "no column of image bytes or paths; name it with --image-column; its columns are text"),
        ([file], {"caption_column": ("texts",)}, "no column 'texts'; its columns are png, score, text"),
        ([file], {"caption_column": ("-",)}, "no column '-'; its columns are png, score, text"),
        ([file], {"class_column": "-"}, "no column '-'; its columns are png, score, text"),
        ([file], {"class_column": "score"}, "column 'score' holds double; a class is an integer"),
        ([file], {"image_column": "score"}, "neither bytes nor paths"),
        ([file, other], {}, "z.parquet: no column 'png', unlike"),
        ([none], {}, "the files hold no row"),
    ):
        with pytest.raises(UserError, match=message):
            _open(*inputs, **options)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from pathlib import Path; from tools.convert.readers import parquet\n"
        "from clipcluster.errors import UserError\n"
        "try: parquet.KIND.open([Path(sys.argv[1])], parquet.Options())\n"
        "except UserError as error: print(error)"
    )
    file = _write(tmp_path / "x.parquet", [{"png": _picture(0)}])
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        capture_output=True,
        text=True,
        env={**os.environ},
        check=True,
    )
    assert done.stdout == "parquet files are read with pyarrow: pip install 'clipcluster[parquet]'\n"
