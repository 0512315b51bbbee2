"""`convert datacompdr`: reinforcement tars joined with img2dataset's image tars by uid."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from clipcluster.errors import UserError
from tools.convert.readers.datacompdr import Options, open_joined
from tools.convert.records import Source


def _numbers(source: Source, datacompdr: Any) -> list[int]:
    """Which samples were joined, found by their uid."""
    known = {datacompdr.uid(number): number for number in range(100)}
    (split,) = source.splits
    return [known[split.read(position).key] for position in range(len(split))]


@pytest.mark.parametrize("edition", ["npz", "pth.gz"])
def test_image_and_reinforcement_of_one_uid_become_one_sample(
    datacompdr: Any, tmp_path: Path, edition: str
) -> None:
    images = datacompdr.images(tmp_path / "images", {0: [4, 1, 3], 1: [12, 10]})
    stored = datacompdr.reinforcements(tmp_path / "dr", {0: [1, 2, 3, 4], 1: [10, 11, 12]}, edition)
    source = open_joined([images, stored], Options())
    assert _numbers(source, datacompdr) == [
        *sorted([1, 3, 4], key=datacompdr.uid),
        *sorted([10, 12], key=datacompdr.uid),
    ]
    assert source.notes == [
        "5 of 7 reinforcements have their image",
        "2 reinforcements have no image, and are left out",
    ]
    (split,) = source.splits
    for position, number in enumerate(_numbers(source, datacompdr)):
        record = split.read(position)
        assert (record.key, record.image) == (datacompdr.uid(number), datacompdr.picture(number))
        assert record.captions == [f"caption {number}"]
        assert record.fields["uid"] == datacompdr.uid(number)
        assert record.fields["url"] == f"http://127.0.0.1/{number}"  # where it was really fetched
        assert record.members == datacompdr.members(number, edition)
        assert split.sizes()[position] > len(datacompdr.picture(number)) + len(
            datacompdr.members(number, edition)[edition]
        )
    assert len(source.inputs) == 4


def test_the_same_shard_comes_first_then_any(datacompdr: Any, tmp_path: Path) -> None:
    images = tmp_path / "images"
    datacompdr.images(images, {0: [1, 2], 1: [1, 3], 7: [5]})
    stored = datacompdr.reinforcements(tmp_path / "dr", {0: [3], 1: [1, 5]})
    source = open_joined([images, stored], Options())
    assert _numbers(source, datacompdr) == [3, *sorted([1, 5], key=datacompdr.uid)]
    (split,) = source.splits
    keys = {number: split.read(at).fields["key"] for at, number in enumerate(_numbers(source, datacompdr))}
    assert keys == {3: "000000010001", 1: "000000010000", 5: "000000070000"}  # 1 is in shards 0 and 1
    assert "2 images have no reinforcement of their own, and are left out" in source.notes


def test_an_image_that_changed_on_the_web_is_said(datacompdr: Any, tmp_path: Path) -> None:
    images = datacompdr.images(tmp_path / "images", {0: [1, 2]}, sha256=datacompdr.sha256(1))
    stored = datacompdr.reinforcements(tmp_path / "dr", {0: [1, 2]})
    source = open_joined([images, stored], Options())
    assert (len(source.splits[0]), source.notes[-1]) == (
        2,
        "1 images have another sha256 than the one that was reinforced, and are taken all the same; "
        "--same-hash leaves them out",
    )
    assert _numbers(open_joined([images, stored], Options(same_hash=True)), datacompdr) == [1]


def test_images_named_by_their_uid_join_too(datacompdr: Any, tmp_path: Path) -> None:
    """As DataComp's resharder names them: `UID-j`, here without any json."""
    (tmp_path / "images").mkdir()
    with webdataset.TarWriter(str(tmp_path / "images" / "00000000.tar"), encoder=False) as tar:
        for number in (2, 1):
            tar.write(
                {"__key__": f"{datacompdr.uid(number)}-0", "jpg": datacompdr.picture(number), "txt": b"words"}
            )
    stored = datacompdr.reinforcements(tmp_path / "dr", {0: [1, 2]})
    source = open_joined([tmp_path / "images", stored], Options())
    assert _numbers(source, datacompdr) == sorted([1, 2], key=datacompdr.uid)
    assert source.splits[0].read(0).fields["url"].startswith("http://elsewhere/")


def test_what_cannot_be_joined_is_said(datacompdr: Any, tmp_path: Path) -> None:
    images = datacompdr.images(tmp_path / "images", {0: [1]})
    stored = datacompdr.reinforcements(tmp_path / "dr", {0: [2]})
    for inputs, words in (
        ([images], "two folders, the images' and the reinforcements', and 1 were given"),
        ([images, images], "no reinforcements .* in its tars; give the images' folder first"),
        ([stored, images], "no image in its tars"),
        ([images, stored], "no uid in common; 0 of 1 reinforcements have their image"),
        ([images, tmp_path / "none"], "no such folder"),
    ):
        with pytest.raises(UserError, match=words):
            open_joined(inputs, Options())


def test_the_command_writes_the_members_as_they_are(datacompdr: Any, tmp_path: Path) -> None:
    images = datacompdr.images(tmp_path / "images", {0: [3, 1], 1: [2]})
    stored = datacompdr.reinforcements(tmp_path / "dr", {0: [1, 2, 3, 4]})
    command = [sys.executable, "-m", "jobs.cli", "shards", "convert", "datacompdr", str(images), str(stored)]
    said = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert "3 of 4 reinforcements have their image\n" in said.stdout
    known = {datacompdr.uid(number): number for number in (1, 2, 3)}
    found = set()
    for sample in webdataset.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False):
        number = known[sample["__key__"]]
        found.add(number)
        assert sample["jpg"] == datacompdr.picture(number)
        assert sample["txt"].decode() == f"caption {number}"
        meta = json.loads(sample["json"])
        assert (meta["captions"], meta["uid"]) == ([f"caption {number}"], sample["__key__"])
        assert {name: sample[name] for name in ("syn.json", "paug.json", "npz")} == datacompdr.members(number)
        assert np.load(io.BytesIO(sample["npz"]))["image_emb"][0, 0] == number
    assert found == {1, 2, 3}
