"""`shards stats`: every figure against what was put in."""

import io
import json
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipcluster.data.shards.indexing import index_folder
from clipcluster.errors import UserError
from tests.shard_writer import ShardWriter
from tools.shards.stats import stats
from tools.shards.stats_plot import draw, require_drawable


def _image(number: int, kind: str, size: tuple[int, int]) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples in three shards: nine images of six kinds named .jpg, two of them the same."""
    images = [
        _image(0, "JPEG", (40, 30)), _image(1, "JPEG", (20, 60)), _image(2, "PNG", (10, 10)), b"<html>",
        _image(3, "GIF", (8, 9)), _image(0, "JPEG", (40, 30)), b"", _image(4, "WEBP", (33, 7)),
        _image(5, "JPEG", (12, 12))[:-200], _image(6, "BMP", (5, 4)), _image(7, "TIFF", (6, 3)),
        _image(8, "PNG", (1, 2)),
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("stats") / "s"
    with ShardWriter(folder, samples_per_shard=5) as writer:
        for number, image in enumerate(images):
            texts = ["é" * 7, "four"][: number % 3]
            key = "k0" if number == 11 else f"k{number}"
            writer.add(key, image, "jpg", texts, cls=number % 2 if number < 6 else None)
    return folder


def test_the_figures_are_those_of_what_was_put_in(folder: Path) -> None:
    found = stats(folder, workers=0)
    assert (found.shards, found.samples, found.used, found.captions) == (3, 12, 9, 12)
    assert found.bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert found.kinds == {"JPEG": 4, "PNG": 2, "GIF": 1, "WebP": 1, "BMP": 1, "TIFF": 1}
    assert [(bad["shard"], bad["key"]) for bad in found.bad] == [
        ("00000.tar", "k3"), ("00001.tar", "k6"), ("00001.tar", "k8"),
    ]  # fmt: skip
    assert "HTML" in found.bad[0]["reason"]
    assert "empty" in found.bad[1]["reason"]
    assert found.used + len(found.bad) == found.samples
    widths = [40, 20, 10, 8, 40, 33, 5, 6, 1]
    figures = found.images["width"]
    assert (figures["count"], figures["min"], figures["median"], figures["max"]) == (9, 1, 10, 40)
    assert figures["mean"] == round(sum(widths) / 9, 2)
    assert sum(figures["histogram"]["counts"]) == 9
    assert found.images["pixels"]["max"] == 1200
    assert found.caption_characters["count"] == 12
    assert (found.caption_characters["min"], found.caption_characters["max"]) == (4, 7)
    assert found.captions_per_sample == {"0": 4, "1": 4, "2": 4}
    assert found.without_caption == 4
    assert found.classes == {"0": 3, "1": 3}
    assert found.duplicates["content"] == {
        "groups": 1,
        "extra": 1,
        "examples": [[{"shard": "00000.tar", "key": "k0"}, {"shard": "00001.tar", "key": "k5"}]],
    }
    assert found.duplicates["keys"]["extra"] == 1
    json.dumps(asdict(found))


def test_without_decoding_only_what_is_no_image_is_bad(folder: Path) -> None:
    found = stats(folder, images=False)
    assert [bad["key"] for bad in found.bad] == ["k3", "k6"]
    assert (found.used, found.decoded) == (10, False)


def test_processes_find_the_same(folder: Path) -> None:
    assert stats(folder, workers=2) == stats(folder, workers=0)


def test_without_an_index_that_fits_one_is_made_for_the_moment(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = stats(tmp_path, images=False)
    assert (found.samples, found.captions) == (12, 12)
    assert "no index" in found.notes[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00001.tar", "00002.tar"]
    index_folder(tmp_path)
    assert stats(tmp_path, images=False).notes == []
    (tmp_path / "00003.tar").write_bytes((folder / "00000.tar").read_bytes())
    found = stats(tmp_path, images=False)
    assert (found.samples, found.shards) == (17, 4)
    assert "lacks 1 shard (00003.tar" in found.notes[0]
    data = (folder / "00001.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(data[: len(data) // 2])
    found = stats(tmp_path, images=False)
    assert found.samples == 15
    assert [one["shard"] for one in found.broken] == ["00000.tar"]
    assert "changed" in found.notes[0]


@pytest.mark.parametrize("harm", ["cut", "emptied", "deleted", "list"])
def test_a_damaged_index_is_not_used(folder: Path, tmp_path: Path, harm: str) -> None:
    for path in folder.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index_folder(tmp_path)
    whole = stats(tmp_path, images=False)
    damaged = tmp_path / ("index.json" if harm == "list" else "00002.tar.idx")
    if harm == "deleted":
        damaged.unlink()
    else:
        damaged.write_bytes(b"{" if harm == "list" else damaged.read_bytes()[: 100 if harm == "cut" else 0])
    found = stats(tmp_path, images=False)
    assert "damaged" in found.notes[0]
    assert replace(found, notes=[]) == whole


def test_another_choice_of_captions(folder: Path) -> None:
    found = stats(folder, captions_choice="json:nothing", images=False)
    assert (found.captions, found.without_caption) == (0, 12)
    with pytest.raises(UserError, match="no such choice"):
        stats(folder, captions_choice="jsn")


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        stats(tmp_path / "x")
    tarfile.open(tmp_path / "empty.tar", "w").close()
    found = stats(tmp_path, images=False)
    assert (found.shards, found.samples, found.used, found.kinds) == (1, 0, 0, {})
    assert found.images["width"] == {"count": 0}


def test_the_picture(folder: Path, tmp_path: Path) -> None:
    draw([stats(folder, images=False)] * 2, tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").size[0] > 1000
    with pytest.raises(UserError, match=r"\.png"):
        require_drawable(tmp_path / "p.xyz")
    with pytest.raises(UserError, match="is not a folder; make it first"):
        require_drawable(tmp_path / "nowhere" / "p.png")
