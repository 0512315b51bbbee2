"""`convert datacompdr`: reinforcement tars joined with img2dataset's image tars by uid."""

import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from clipcluster.errors import UserError
from tools.readers.datacompdr import Options, open_joined
from tools.records import Source


def _uid(number: int) -> str:
    return hashlib.md5(str(number).encode()).hexdigest()


def _picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((10, 12, 3), number, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def _sha256(number: int) -> str:
    return hashlib.sha256(_picture(number)).hexdigest()


def _images(folder: Path, shards: dict[int, list[int]], **changed: Any) -> Path:
    """DataComp's pool by img2dataset: 12-digit keys, uid in the json."""
    folder.mkdir()
    for shard, numbers in shards.items():
        with webdataset.TarWriter(str(folder / f"{shard:08d}.tar")) as tar:
            for row, number in enumerate(numbers):
                meta = {
                    "uid": _uid(number),
                    "caption": f"caption {number}",
                    "url": f"http://127.0.0.1/{number}",
                }
                meta |= {"key": f"{shard:08d}{row:04d}", "width": 12, "sha256": _sha256(number), **changed}
                tar.write(
                    {
                        "__key__": meta["key"],
                        "jpg": _picture(number),
                        "txt": f"caption {number}",
                        "json": json.dumps(meta, indent=4),
                    }
                )
    return folder


def _stored(number: int, edition: str) -> dict[str, bytes]:
    """Teacher embeddings in either edition's file."""
    arrays = {"image_emb": np.full((3, 8), number, np.float32), "text_emb": np.ones((6, 8), np.float32)}
    file = io.BytesIO()
    if edition == "npz":
        np.savez(file, **arrays)
        return {"npz": file.getvalue()}
    torch.save({name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}, file)
    return {"pth.gz": gzip.compress(file.getvalue(), mtime=0)}


def _members(number: int, edition: str = "npz") -> dict[str, bytes]:
    box = [[1.5, 2.5, 8.0, 8.0], [[6, 0.27], [0, 0.0]]]
    return {
        "syn.json": json.dumps({"syn_text": [f"synthetic {i} of {number}" for i in range(5)]}).encode(),
        "paug.json": json.dumps({"param_aug": [box] * 3}).encode(),
        **_stored(number, edition),
    }


def _reinforcements(folder: Path, shards: dict[int, list[int]], edition: str = "npz") -> Path:
    """DataCompDR's tars: key = uid, neither images nor captions."""
    folder.mkdir()
    for shard, numbers in shards.items():
        with webdataset.TarWriter(str(folder / f"{shard:08d}.tar"), encoder=False) as tar:
            for number in numbers:
                meta = {"uid": _uid(number), "sha256": _sha256(number)}
                tar.write(
                    {
                        "__key__": _uid(number),
                        "url.txt": f"http://elsewhere/{number}".encode(),
                        "json": json.dumps(meta).encode(),
                        **_members(number, edition),
                    }
                )
    return folder


def _numbers(source: Source) -> list[int]:
    """Which samples were joined, found by their uid."""
    known = {_uid(number): number for number in range(100)}
    (split,) = source.splits
    return [known[split.read(position).key] for position in range(len(split))]


def _by_uid(*numbers: int) -> list[int]:
    return sorted(numbers, key=_uid)


@pytest.mark.parametrize("edition", ["npz", "pth.gz"])
def test_image_and_reinforcement_of_one_uid_become_one_sample(tmp_path: Path, edition: str) -> None:
    images = _images(tmp_path / "images", {0: [4, 1, 3], 1: [12, 10]})
    stored = _reinforcements(tmp_path / "dr", {0: [1, 2, 3, 4], 1: [10, 11, 12]}, edition)
    source = open_joined([images, stored], Options())
    assert _numbers(source) == [*_by_uid(1, 3, 4), *_by_uid(10, 12)]
    assert source.notes == [
        "5 of 7 reinforcements have their image",
        "2 reinforcements have no image, and are left out",
    ]
    (split,) = source.splits
    for position, number in enumerate(_numbers(source)):
        record = split.read(position)
        assert (record.key, record.image) == (_uid(number), _picture(number))
        assert record.captions == [f"caption {number}"]
        assert record.fields["uid"] == _uid(number)
        assert record.fields["url"] == f"http://127.0.0.1/{number}"  # where it was really fetched
        assert record.members == _members(number, edition)
        assert split.sizes()[position] > len(_picture(number)) + len(_members(number, edition)[edition])
    assert len(source.inputs) == 4


def test_the_same_shard_comes_first_then_any(tmp_path: Path) -> None:
    images = tmp_path / "images"
    _images(images, {0: [1, 2], 1: [1, 3], 7: [5]})
    stored = _reinforcements(tmp_path / "dr", {0: [3], 1: [1, 5]})
    source = open_joined([images, stored], Options())
    assert _numbers(source) == [3, *_by_uid(1, 5)]
    (split,) = source.splits
    keys = {number: split.read(at).fields["key"] for at, number in enumerate(_numbers(source))}
    assert keys == {3: "000000010001", 1: "000000010000", 5: "000000070000"}  # 1 is in shards 0 and 1
    assert "2 images have no reinforcement of their own, and are left out" in source.notes


def test_an_image_that_changed_on_the_web_is_said(tmp_path: Path) -> None:
    images = _images(tmp_path / "images", {0: [1, 2]}, sha256=_sha256(1))
    stored = _reinforcements(tmp_path / "dr", {0: [1, 2]})
    source = open_joined([images, stored], Options())
    assert (len(source.splits[0]), source.notes[-1]) == (
        2,
        "1 images have another sha256 than the one that was reinforced, and are taken all the same; "
        "--same-hash leaves them out",
    )
    assert _numbers(open_joined([images, stored], Options(same_hash=True))) == [1]


def test_images_named_by_their_uid_join_too(tmp_path: Path) -> None:
    """As DataComp's resharder names them: `UID-j`, here without any json."""
    (tmp_path / "images").mkdir()
    with webdataset.TarWriter(str(tmp_path / "images" / "00000000.tar"), encoder=False) as tar:
        for number in (2, 1):
            tar.write({"__key__": f"{_uid(number)}-0", "jpg": _picture(number), "txt": b"words"})
    stored = _reinforcements(tmp_path / "dr", {0: [1, 2]})
    source = open_joined([tmp_path / "images", stored], Options())
    assert _numbers(source) == _by_uid(1, 2)
    assert source.splits[0].read(0).fields["url"].startswith("http://elsewhere/")


def test_what_cannot_be_joined_is_said(tmp_path: Path) -> None:
    images = _images(tmp_path / "images", {0: [1]})
    stored = _reinforcements(tmp_path / "dr", {0: [2]})
    for inputs, words in (
        ([images], "two folders, the images' and the reinforcements', and 1 were given"),
        ([images, images], "no reinforcements .* in its tars; give the images' folder first"),
        ([stored, images], "no image in its tars"),
        ([images, stored], "no uid in common; 0 of 1 reinforcements have their image"),
        ([images, tmp_path / "none"], "no such folder"),
    ):
        with pytest.raises(UserError, match=words):
            open_joined(inputs, Options())
