"""`convert img2dataset`: the layout of img2dataset 1.47, built row by row, and the program itself."""

import http.server
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipcluster.data.shards.indexing import index_folder
from clipcluster.data.shards.open import open_folder
from clipcluster.errors import UserError
from tools.convert.readers.img2dataset import KIND, Options, open_downloads
from tools.convert.readers.sample_choice import read_uids
from tools.convert.records import BadRecord, Source, Split


def _open(*folders: Path, **options: Any) -> Source:
    return open_downloads(list(folders), Options(**options))


def _keys(source: Source) -> list[str]:
    (split,) = source.splits
    return [split.read(number).key for number in range(len(split))]


@pytest.fixture(scope="module")
def folder(downloads: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return downloads.make(tmp_path_factory.mktemp("downloads") / "out")


GOOD = [number for number in range(16) if number % 8 not in (3, 5)]


def test_every_success_by_key_with_its_fields(downloads: Any, folder: Path) -> None:
    source = _open(folder)
    (split,) = source.splits
    assert (split.name, len(split)) == ("", len(GOOD))
    assert split.sizes().tolist() == [len(downloads.picture(number)) for number in GOOD]
    for position, number in enumerate(GOOD):
        record = split.read(position)
        expected = downloads.row(number, f"{number // 8:05d}{number % 8:04d}")
        assert record.key == expected["key"]
        assert record.image == downloads.picture(number)
        assert list(record.captions) == ([expected["caption"]] if expected["caption"] else [])
        assert record.fields == expected
        assert (record.cls, record.members) == (None, {})
    assert [entry.path for entry in source.inputs] == [str(folder / f"0000{n}.tar") for n in range(2)]


def test_failures_are_counted_from_the_parquet(downloads: Any, folder: Path, tmp_path: Path) -> None:
    assert _open(folder).notes == ["4 of 16 downloads failed: 2 failed_to_download, 2 failed_to_resize"]
    half = downloads.make(tmp_path / "half")
    (half / "00001.parquet").unlink()
    with open(half / "00001.tar", "r+b") as tar:
        tar.truncate(tar.seek(0, os.SEEK_END) - 1024 - 3 * 512)  # killed inside the last sample
    notes = _open(half).notes
    assert len(notes) == 3
    assert "00001.tar: cut" in notes[0] or "00001.tar: ends" in notes[0]
    assert "00001.parquet does not exist (1 of 2 shards have none)" in notes[1]
    assert notes[2].startswith("2 of 8 downloads failed")


def test_an_unfinished_parquet_is_said(downloads: Any, tmp_path: Path) -> None:
    out = downloads.make(tmp_path / "out")
    (out / "00000.parquet").write_bytes(b"")
    with open(out / "00001.parquet", "r+b") as file:
        file.truncate(300)
    assert _open(out).notes == [
        f"{out / name} is truncated or not a parquet file: the download may be unfinished"
        for name in ("00000.parquet", "00001.parquet")
    ]


def test_without_pyarrow_all_but_the_failures_is_known(folder: Path) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from pathlib import Path; from tools.convert.readers.img2dataset import KIND, Options\n"
        "source = KIND.open([Path(sys.argv[1])], Options())\n"
        "print(len(source.splits[0]), *source.notes); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        "12 what failed to download was not counted; that needs: pip install 'clipcluster[parquet]'\n"
    )


def test_a_tar_that_its_parquet_contradicts_is_named(downloads: Any, tmp_path: Path) -> None:
    out = downloads.make(tmp_path / "out")
    (out / "00000.tar").write_bytes((out / "00001.tar").read_bytes()[: -20 * 512] + bytes(1024))
    assert any("00000.tar" in note and "its parquet says 6" in note for note in _open(out).notes)


def test_the_output_of_files_is_the_same(folder: Path, tmp_path: Path) -> None:
    source = _open(folder)
    for shard in range(2):
        (tmp_path / f"{shard:05d}").mkdir()
        for name in (f"{shard:05d}.parquet", f"{shard:05d}_stats.json"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        for sample in webdataset.WebDataset(str(folder / f"{shard:05d}.tar"), shardshuffle=False):
            for extension in ("jpg", "json", "txt"):
                (tmp_path / f"{shard:05d}" / f"{sample['__key__']}.{extension}").write_bytes(
                    sample[extension]
                )
    again = _open(tmp_path)
    assert again.notes == source.notes
    assert again.splits[0].sizes().tolist() == source.splits[0].sizes().tolist()
    for number in range(len(GOOD)):
        assert again.splits[0].read(number) == source.splits[0].read(number)


def _write_uids(path: Path, uids: list[str], how: str) -> Path:
    pairs = [divmod(int(uid, 16), 2**64) for uid in uids]
    array = np.array(pairs, np.dtype("u8,u8"))
    if how == "npy":
        np.save(path, array)
        return path.with_name(path.name + ".npy")
    path.write_bytes(array.tobytes() if how == "raw" else "".join(f"{uid}\n" for uid in uids).encode())
    return path


@pytest.mark.parametrize("how", ["npy", "raw", "text"])
def test_a_subset_by_uid_repeats_what_repeats(downloads: Any, folder: Path, tmp_path: Path, how: str) -> None:
    wanted = [9, 2, 14, 9, 9, 700, 3, 2]  # 700 is nowhere, 3 was not downloaded; not sorted
    file = _write_uids(tmp_path / "uids", list(map(downloads.uid, wanted)), how)
    assert [uid.hex().zfill(32) for uid in read_uids(file).tolist()] == [
        downloads.uid(number) for number in wanted
    ]
    source = _open(folder, uids=file)
    (split,) = source.splits
    assert _keys(source) == [
        f"{downloads.uid(2)}-0",
        f"{downloads.uid(2)}-1",
        *[f"{downloads.uid(9)}-{j}" for j in range(3)],
        f"{downloads.uid(14)}-0",
    ]
    assert [split.read(number).image for number in range(6)] == [
        downloads.picture(n) for n in (2, 2, 9, 9, 9, 14)
    ]
    assert split.sizes().tolist() == [len(downloads.picture(n)) for n in (2, 2, 9, 9, 9, 14)]
    assert f"3 of the 5 uids of {file} are there, 6 samples with repeats" in source.notes
    assert source.inputs[-1].path == str(file)


def test_uids_with_zeros_at_either_end(tmp_path: Path) -> None:
    numbers = [0, 1, 1 << 120, 0xAB << 8, (1 << 128) - 1, 1 << 64]
    np.save(tmp_path / "uids.npy", np.array([divmod(number, 2**64) for number in numbers], "<u8,<u8"))
    uids = read_uids(tmp_path / "uids.npy")
    assert [int.from_bytes(uid.ljust(16, b"\0"), "big") for uid in uids.tolist()] == numbers
    assert sorted(uids.tolist()) == [uids[number] for number in np.argsort(np.array(numbers, object))]


def test_a_uid_in_two_shards_is_taken_once(downloads: Any, folder: Path, tmp_path: Path) -> None:
    twin = downloads.make(tmp_path / "twin")
    file = _write_uids(tmp_path / "uids", list(map(downloads.uid, [1, 1, 2])), "raw")
    source = _open(folder, twin, uids=file)
    assert _keys(source) == [f"{downloads.uid(1)}-0", f"{downloads.uid(1)}-1", f"{downloads.uid(2)}-0"]
    assert "2 samples have a uid that came before, and are left out" in source.notes


def test_equal_keys_of_two_downloads_get_numbers(downloads: Any, folder: Path, tmp_path: Path) -> None:
    other = downloads.make(tmp_path / "other", first=100)
    source = _open(folder, other)
    keys = _keys(source)
    assert (
        len(set(keys)) == len(keys) == 2 * len(GOOD) + sum(n % 8 not in (3, 5) for n in range(100, 116)) - 12
    )
    assert keys[: len(GOOD)] == _keys(_open(folder))
    assert {key.rpartition("-")[2] for key in keys[len(GOOD) :] if "-" in key} == {"1"}
    assert any("have a key that came before" in note for note in source.notes)


def test_a_numbered_key_is_never_another_samples(downloads: Any, tmp_path: Path) -> None:
    for folder, keys in (("a", ["x", "x-1"]), ("b", ["x"])):
        (tmp_path / folder).mkdir()
        with webdataset.TarWriter(str(tmp_path / folder / "00000.tar")) as tar:
            for key in keys:
                tar.write({"__key__": key, "jpg": downloads.picture(0)})
    assert _keys(_open(tmp_path / "a", tmp_path / "b")) == ["x", "x-1", "x--1"]


def test_once_takes_the_first_of_equal_values(downloads: Any, folder: Path, tmp_path: Path) -> None:
    twin = downloads.make(tmp_path / "twin")
    source = _open(folder, twin, once="sha256")
    assert _keys(source) == _keys(_open(folder))
    assert f"{len(GOOD)} samples with a sha256 that came before are left out" in source.notes


def test_captions_may_be_a_field_of_the_json(folder: Path) -> None:
    (split,) = _open(folder, caption_field="url").splits
    assert list(split.read(0).captions) == ["http://127.0.0.1/0.jpg"]


def test_a_sample_that_cannot_be_read_is_bad(downloads: Any, tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "00000.tar"), encoder=False) as tar:
        tar.write({"__key__": "a", "jpg": downloads.picture(0), "json": b"{cut"})
        tar.write({"__key__": "b", "jpg": downloads.picture(1), "txt": b"\xff\xfe"})
        tar.write({"__key__": "c", "txt": b"no image"})
        tar.write(
            {
                "__key__": "d",
                "png": downloads.picture(2),
                "cls": b"7",
                "npy": b"else",
                "json": b'{"captions": ["x", "y"]}',
            }
        )
    source = _open(tmp_path)
    (split,) = source.splits
    with pytest.raises(BadRecord, match="a: its json cannot be read"):
        split.read(0)
    with pytest.raises(BadRecord, match="b: its txt is not UTF-8"):
        split.read(1)
    record = split.read(2)
    assert (record.captions, record.cls, record.members, record.fields) == (
        ["x", "y"],
        7,
        {"npy": b"else"},
        {},
    )
    assert source.notes == ["1 samples without an image are left out"]


def _key(split: Split, number: int) -> str:
    return split.read(number).key


def test_any_process_reads_any_sample(folder: Path, in_others: Any) -> None:
    (split,) = _open(folder).splits
    split.read(3)
    assert in_others(_key, split, range(len(GOOD))) == _keys(_open(folder))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (None, "neither NAME.tar nor folders NAME"),
        ("00000.parquet", "clipcluster shards convert parquet"),
        ("part/00000.tar other/00000.tar", "the tars lie in its folders other, part"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, file: str | None, words: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        _open(tmp_path / "nowhere")
    for name in (file or "").split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=words):
        _open(tmp_path)


def test_downloads_one_folder_below_are_found(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "above" / "pool")
    assert _keys(_open(tmp_path / "above")) == _keys(_open(folder))


def test_broken_uid_files_are_refused(downloads: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"\x01" * 17)
    (tmp_path / "text").write_text(downloads.uid(0) + "\nnot a uid\n")
    np.save(tmp_path / "one.npy", np.zeros(4, np.uint64))
    for name, words in (
        ("raw", "17 bytes are not a uid file"),
        ("text", "line 2 is not a uid: 'not'"),
        ("one.npy", "uids have dtype u8,u8"),
        ("none", "No such file"),
    ):
        with pytest.raises(UserError, match=words):
            _open(folder, uids=tmp_path / name)
    none = _write_uids(tmp_path / "none_there", list(map(downloads.uid, [900])), "raw")
    with pytest.raises(UserError, match="no sample meets these conditions"):
        _open(folder, uids=none)


def test_the_folder_can_be_indexed_as_it_is(folder: Path, tmp_path: Path) -> None:
    summary = index_folder(folder, tmp_path)
    assert (summary.samples, summary.captions, summary.without_caption) == (12, 10, 2)
    shards = open_folder(folder, tmp_path)
    found = {sample.key: sample for sample in map(shards.read, range(12))}
    for record in map(_open(folder).splits[0].read, range(12)):
        assert (found[record.key].image, found[record.key].captions) == (record.image, record.captions)


def test_the_command_converts_a_subset(downloads: Any, folder: Path, tmp_path: Path) -> None:
    assert KIND.open is open_downloads
    file = _write_uids(tmp_path / "uids", list(map(downloads.uid, [15, 0, 1, 15])), "npy")
    command = [sys.executable, "-m", "jobs.cli", "shards", "convert", "img2dataset", str(folder)]
    command += ["--uids", str(file), "--out", str(tmp_path / "out"), "--samples-per-shard", "3"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "4 of 16 downloads failed: 2 failed_to_download, 2 failed_to_resize\n" in said
    assert f"3 of the 3 uids of {file} are there, 4 samples with repeats\n" in said
    assert "4 samples with 3 captions in 2 shards, 1 without a caption" in said
    shards = open_folder(tmp_path / "out")
    samples = [shards.read(number) for number in range(4)]
    assert [sample.key for sample in samples] == [
        f"{downloads.uid(number)}-{repeat}" for number, repeat in ((0, 0), (1, 0), (15, 0), (15, 1))
    ]
    assert [sample.captions for sample in samples][1:] == [[], *[["caption 15\nsecond line"]] * 2]
    assert [sample.image for sample in samples] == [downloads.picture(number) for number in (0, 1, 15, 15)]


@pytest.fixture
def web(downloads: Any, tmp_path: Path) -> Iterator[str]:
    """A server of 24 images; /missing-* is 404, /page-* a web page under an image's name."""
    (tmp_path / "web").mkdir()
    for number in range(24):
        (tmp_path / "web" / f"{number}.jpg").write_bytes(downloads.picture(number))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/page-"):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"<html>moved</html>")
            else:
                super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path / "web"))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.long
@pytest.mark.parametrize("output", ["webdataset", "files"])
def test_what_the_real_img2dataset_downloads(downloads: Any, web: str, tmp_path: Path, output: str) -> None:
    python = os.environ.get("CLIPCLUSTER_IMG2DATASET_PYTHON")
    if not python:
        pytest.skip(
            "CLIPCLUSTER_IMG2DATASET_PYTHON names no Python that has img2dataset (its own environment)"
        )
    rows = [
        {"url": f"{web}/{n}.jpg", "text": f"picture {n}" if n % 6 else None, "uid": downloads.uid(n)}
        for n in range(24)
    ]
    rows[5:5] = [{"url": f"{web}/missing-1.jpg", "text": "gone", "uid": downloads.uid(100)}]
    rows[9:9] = [{"url": f"{web}/page-1.jpg", "text": "a page", "uid": downloads.uid(101)}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    options = {
        "url_list": tmp_path / "list.parquet",
        "input_format": "parquet",
        "caption_col": "text",
        "save_additional_columns": '["uid"]',
        "output_format": output,
        "output_folder": tmp_path / "out",
        "number_sample_per_shard": 13,
        "thread_count": 2,
        "resize_mode": "keep_ratio_largest",
        "resize_only_if_bigger": True,
    }
    code = "import fire, img2dataset; fire.Fire(img2dataset.download)"
    command = [python, "-c", code, *(f"--{name}={value}" for name, value in options.items())]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]

    source = _open(tmp_path / "out")
    assert source.notes == ["2 of 26 downloads failed: 1 failed_to_download, 1 failed_to_resize"]
    (split,) = source.splits
    records = [split.read(number) for number in range(len(split))]
    assert [record.fields["uid"] for record in records] == [downloads.uid(number) for number in range(24)]
    for number, record in enumerate(records):
        assert record.captions == ([f"picture {number}"] if number % 6 else [])
        assert Image.open(io.BytesIO(record.image)).size == (20, 14)
    file = _write_uids(tmp_path / "uids", list(map(downloads.uid, [4, 4, 20])), "npy")
    assert _keys(_open(tmp_path / "out", uids=file)) == [
        f"{downloads.uid(4)}-0",
        f"{downloads.uid(4)}-1",
        f"{downloads.uid(20)}-0",
    ]


@given(st.lists(st.integers(0, 9), max_size=30), st.lists(st.integers(0, 12), max_size=30))
def test_any_list_of_uids_is_taken_as_often_as_it_says(held: list[int], wanted: list[int]) -> None:
    """Against the plain way: for every uid's first sample, in order, as many as the list has of it."""
    uid = {number: f"{number * 7919 << 96 | number << 8:032x}" for number in range(13)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with webdataset.TarWriter(str(folder / "0.tar")) as tar:
            for row, number in enumerate(held):
                tar.write({"__key__": f"{row:03d}", "jpg": b"i%d" % row, "json": {"uid": uid[number]}})
        pairs = [divmod(int(uid[number], 16), 2**64) for number in wanted]
        np.array(pairs, "<u8,<u8").tofile(folder / "uids")
        first = {number: held.index(number) for number in held}
        expected = [
            (f"{uid[number]}-{repeat}", b"i%d" % row)
            for number, row in sorted(first.items(), key=lambda item: item[1])
            for repeat in range(wanted.count(number))
        ]
        if not expected:
            with pytest.raises(UserError, match="no sample meets these conditions"):
                _open(folder, uids=folder / "uids")
            return
        (split,) = _open(folder, uids=folder / "uids").splits
        records = [split.read(number) for number in range(len(split))]
        assert [(record.key, record.image) for record in records] == expected
