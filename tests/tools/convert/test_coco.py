"""`convert coco`: COCO's zips and what they hold, record by record."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipcluster.errors import UserError
from tools.convert.readers.coco import KIND, Options
from tools.convert.records import BadRecord, InputFile, Source, Split

IN_ORDER = {"train": [9, 25, 30, 57, 9000, 581921], "val": [139, 285, 632], "test": [1, 191]}


def _open(*inputs: Path, **options: Any) -> Source:
    return KIND.open(inputs, Options(**options))


def _check(source: Source, coco: Any, splits: tuple[str, ...] = ("train", "val", "test")) -> None:
    """Every record is exactly what was put in."""
    assert [split.name for split in source.splits] == list(splits)
    for split in source.splits:
        assert len(split) == len(IN_ORDER[split.name])
        assert split.files == {}
        for at, number in enumerate(IN_ORDER[split.name]):
            record = split.read(at)
            assert record.key == f"{number:012d}"
            assert record.image == coco.images[split.name, number]
            assert list(record.captions) == coco.captions(split.name, number)
            assert record.fields["id"] == number
            assert (record.fields["width"], record.fields["height"]) == (20, 14)
            assert record.fields["coco_url"].endswith(f"/{number:012d}.jpg")
            assert record.cls is None
            assert split.sizes()[at] == len(record.image)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_five_zips(coco: Any, tmp_path: Path, method: int) -> None:
    folder = coco.zips(tmp_path / "coco", method)
    source = _open(folder)
    _check(source, coco)
    assert source.inputs == [InputFile.of(path) for path in sorted(folder.iterdir())]
    captions = sum(5 + number % 3 for number in IN_ORDER["train"])
    assert f"train: 6 images listed, 0 of them without a caption; {captions} captions" in source.notes
    assert "test: 2 images listed, 2 of them without a caption; 0 captions" in source.notes


def test_extracted_and_mixed(coco: Any, tmp_path: Path) -> None:
    folder = coco.zips(tmp_path / "coco")
    for name in ("train2017", "annotations_trainval2017", "image_info_test2017", "test2017", "val2017"):
        with zipfile.ZipFile(folder / f"{name}.zip") as archive:
            archive.extractall(folder)
        if name != "val2017":
            (folder / f"{name}.zip").unlink()
    (folder / "val2017" / "000000000139.jpg").unlink()  # the zip beside it is whole, and is read
    source = _open(folder)
    _check(source, coco)
    before = next(file for file in source.inputs if file.path == str(folder / "train2017"))
    os.utime(folder / "train2017" / "000000000009.jpg", ns=(1, 1))
    assert before not in _open(folder).inputs
    assert before.bytes == sum(len(coco.images["train", number]) for number in coco.ids["train"])
    moved = folder / "images"
    moved.mkdir()
    (folder / "train2017").rename(moved / "train2017")
    _check(_open(folder), coco)
    one_by_one = (moved / "train2017", folder / "val2017.zip", folder / "annotations")
    _check(_open(*one_by_one), coco, ("train", "val"))
    _check(_open(folder / "val2017.zip", folder / "annotations" / "captions_val2017.json"), coco, ("val",))


def test_zips_of_which_some_are_missing(coco: Any, tmp_path: Path) -> None:
    folder = coco.zips(tmp_path / "coco")
    (folder / "train2017.zip").unlink()
    (folder / "image_info_test2017.zip").unlink()
    source = _open(folder)
    _check(source, coco, ("val",))
    assert any(
        "train was left out" in note and "images of train2017 are not" in note for note in source.notes
    )
    assert any("test was left out" in note and "image_info_test2017.zip" in note for note in source.notes)
    (folder / "annotations_trainval2017.zip").unlink()
    with pytest.raises(UserError, match=r"captions_val2017.json is not; give annotations_trainval2017.zip"):
        _open(folder)
    (folder / "val2017.zip").unlink()
    with pytest.raises(UserError, match="nothing to convert"):
        _open(folder)


def test_images_that_do_not_fit_the_annotations(coco: Any, tmp_path: Path) -> None:
    text = coco.document("val")
    text["images"].append({**text["images"][0], "id": 7, "file_name": "000000000007.jpg"})
    text["images"].append(dict(text["images"][0]))
    text["annotations"].append({"image_id": 8, "id": 1, "caption": "of nothing"})
    text["annotations"].append({"image_id": 139, "id": 2, "caption": " \n"})
    text["annotations"] = [a for a in text["annotations"] if a["image_id"] != 285]
    folder = coco.zips(tmp_path / "coco", texts={"captions_val2017.json": text})
    with zipfile.ZipFile(folder / "val2017.zip", "a") as archive:
        archive.writestr("val2017/000000000700.jpg", b"extra")
    source = _open(folder / "val2017.zip", folder / "annotations_trainval2017.zip")
    (split,) = source.splits
    records, bad = _read_all(split)
    assert [record.key[-3:] for record in records] == ["139", "285", "632"]
    assert list(records[0].captions) == coco.captions("val", 139)
    assert list(records[1].captions) == []
    assert bad == [
        ("000000000007", "val2017/000000000007.jpg is not there"),
        ("000000000008", "1 captions of images that are not listed"),
        ("000000000139", "val2017/000000000139.jpg is listed twice"),
    ]
    assert "val: 4 images listed, 2 of them without a caption; 13 captions" in source.notes
    assert any("val2017: 1 files (000000000700.jpg, …) are not listed" in note for note in source.notes)
    assert split.sizes().tolist().count(0) == 3


def test_a_file_of_annotations_without_images_leaves_all_files_out(coco: Any, tmp_path: Path) -> None:
    folder = coco.zips(tmp_path / "coco", texts={"captions_val2017.json": {"images": []}})
    source = _open(folder / "val2017.zip", folder / "annotations_trainval2017.zip")
    assert any(note.startswith("val2017: ") and "are not listed" in note for note in source.notes)
    assert [Path(file.path).name for file in source.inputs] == ["annotations_trainval2017.zip", "val2017.zip"]
    assert source.splits[0].sizes().dtype == np.int64


def _read_all(split: Split) -> tuple[list[Any], list[tuple[str, str]]]:
    records, bad = [], []
    for number in range(len(split)):
        try:
            records.append(split.read(number))
        except BadRecord as error:
            bad.append((error.key, error.reason))
    return records, bad


def test_damage_within_a_zip_is_found(coco: Any, tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        folder = coco.zips(tmp_path / str(method), method)
        data = bytearray((folder / "val2017.zip").read_bytes())
        with zipfile.ZipFile(folder / "val2017.zip") as archive:
            members = {info.filename[-7:-4]: info for info in archive.infolist()}
        data[members["139"].header_offset + 200] ^= 1
        data[members["632"].header_offset] ^= 1
        (folder / "val2017.zip").write_bytes(data)
        (split,) = _open(folder / "val2017.zip", folder / "annotations_trainval2017.zip").splits
        records, bad = _read_all(split)
        assert [record.key[-3:] for record in records] == ["285"]
        assert [key[-3:] for key, _ in bad] == ["139", "632"]
        assert "no member begins" in bad[1][1]


def test_2014_and_both_years(coco: Any, coco_of_2014: Any, tmp_path: Path) -> None:
    folder = coco_of_2014.zips(tmp_path / "coco")
    _check(_open(folder), coco_of_2014)
    coco.zips(folder)
    with pytest.raises(UserError, match="images of 2014 and 2017: give --year 2014 or --year 2017"):
        _open(folder)
    _check(_open(folder, year="2014"), coco_of_2014)
    _check(_open(folder, year="2017"), coco)
    with pytest.raises(UserError, match="--year 2015: there are images of 2014 and 2017 alone"):
        _open(folder, year="2015")


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_karpathys_splits(coco: Any, coco_of_2014: Any, tmp_path: Path, year: str) -> None:
    data = coco if year == "2017" else coco_of_2014
    folder = data.zips(tmp_path / "coco")
    (tmp_path / "dataset_coco.json").write_text(json.dumps(coco.karpathy()))
    source = _open(folder, karpathy=tmp_path / "dataset_coco.json")
    found = {split.name: [split.read(n) for n in range(len(split))] for split in source.splits}
    assert {name: [record.fields["id"] for record in records] for name, records in found.items()} == {
        "train": [9, 57, 632, 581921],
        "val": [30],
        "test": [139],
    }
    for record in (record for records in found.values() for record in records):
        number = record.fields["id"]
        part = "train" if number in data.ids["train"] else "val"
        assert record.image == data.images[part, number]
        assert list(record.captions) == [f"Said of {number}."]
        assert record.fields["file_name"] == data.file_name(part, number)
    assert found["train"][0].fields["split"] == "restval"
    with pytest.raises(UserError, match=rf"val{year} is not there"):
        _open(folder / f"train{year}.zip", karpathy=tmp_path / "dataset_coco.json")


def test_another_file_for_karpathys(coco: Any, coco_of_2014: Any, tmp_path: Path) -> None:
    folder = coco_of_2014.zips(tmp_path / "coco")
    flickr = {"dataset": "flickr30k", "images": [{"filename": "1.jpg", "split": "train", "sentences": []}]}
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps(flickr))
    with pytest.raises(UserError, match=r"not the dataset_coco.json that is wanted, but of flickr30k"):
        _open(folder, karpathy=tmp_path / "dataset_flickr30k.json")
    with pytest.raises(UserError, match="no such file"):
        _open(folder, karpathy=tmp_path / "nothing.json")


def test_what_is_not_coco_is_said(coco: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no images of COCO there; .*annotations_trainval2017.zip"):
        _open(tmp_path / "empty")
    with pytest.raises(UserError, match="is not there"):
        _open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no INPUT was given"):
        _open()
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="neither a zip nor"):
        _open(tmp_path / "thesis.txt")
    folder = coco.zips(tmp_path / "coco")
    whole = (folder / "train2017.zip").read_bytes()
    (folder / "train2017.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train2017.zip is not a complete zip .*download it again"):
        _open(folder)
    (folder / "train2017.zip").write_bytes(whole)
    with zipfile.ZipFile(folder / "annotations_trainval2017.zip", "w") as archive:
        archive.writestr("annotations/captions_train2017.json", '{"images": [')
    with pytest.raises(UserError, match=r"captions_train2017.json is not complete JSON"):
        _open(folder)
    with zipfile.ZipFile(folder / "annotations_trainval2017.zip", "w") as archive:
        archive.writestr("annotations/captions_train2017.json", '{"images": [{"name": 1}]}')
    with pytest.raises(UserError, match=r"entries of train2017 are not in COCO's format"):
        _open(folder)


def _key_and_bytes(split: Split, number: int) -> tuple[str, bytes]:
    record = split.read(number)
    return record.key, record.image


def test_read_from_other_processes(coco: Any, tmp_path: Path, in_others: Any) -> None:
    split = _open(coco.zips(tmp_path / "coco")).splits[0]
    here = [_key_and_bytes(split, number) for number in range(len(split))]
    assert in_others(_key_and_bytes, split, range(len(split))) == here
