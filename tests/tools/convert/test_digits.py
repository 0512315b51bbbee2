"""`convert digits`: real scans, the same bytes every time."""

import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from clipcluster.data.images.decode import decode
from clipcluster.data.shards.indexing import index_folder
from clipcluster.data.shards.open import open_folder
from clipcluster.data.shards.shard_list import read_summary
from clipcluster.errors import UserError
from tools.convert.convert import convert
from tools.convert.readers import digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    assert convert("digits", out).made
    return out


def test_the_scans_are_the_scans(folder: Path) -> None:
    data = load_digits()
    numbers = []
    for split, count in (("train", 1437), ("test", 360)):
        shards = open_folder(folder / split)
        assert shards.n_samples == count
        assert shards.n_pairs == count * len(digits.TEMPLATES)
        for position in range(0, count, 7):
            sample = shards.read(position)
            number = int(sample.key.removeprefix("digit-"))
            assert sample.cls == data.target[number]
            assert sample.captions[0] == f"a scan of the handwritten digit {digits.CLASSNAMES[sample.cls]}"
            pixels = decode(sample.image)[0].numpy()
            np.testing.assert_array_equal(pixels, np.rint(data.images[number] * 255 / 16))
        numbers += [int(shards.read(position).key.removeprefix("digit-")) for position in range(count)]
    assert sorted(numbers) == list(range(1797))


def test_each_digit_is_held_out_equally(folder: Path) -> None:
    shards = open_folder(folder / "test")
    counts = np.bincount([shards.read(position).cls for position in range(360)])
    assert counts.tolist() == [36] * 10


def test_names_and_templates_lie_beside_the_tars(folder: Path) -> None:
    for split in digits.SPLITS:
        shards = open_folder(folder / split)
        assert shards.classnames == list(digits.CLASSNAMES)
        assert shards.templates == list(digits.TEMPLATES)
        assert all("{c}" in template for template in shards.templates)


def test_twice_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    convert("digits", tmp_path / "again")
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    for file in files:
        if file.name not in ("index.json", "index.bin"):  # these hold times
            assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    for split in digits.SPLITS:
        assert open_folder(folder / split).fingerprint == open_folder(tmp_path / "again" / split).fingerprint


def test_the_index_written_with_the_shards_is_that_of_a_scan(folder: Path, tmp_path: Path) -> None:
    index_folder(folder / "test", tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / "test" / path.name).read_bytes()


def test_a_finished_folder_is_left_alone(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = convert("digits", folder)
    assert not done.made
    assert done.splits["train"] == read_summary(folder / "train")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_what_cannot_be_converted_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'digit'.*there are: .*digits"):
        convert("digit", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a conversion"):
        convert("digits", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]
