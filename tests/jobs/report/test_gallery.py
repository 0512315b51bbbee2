"""Pictures in a page come from the run's shards, by shard and key."""

import base64
import io

import numpy as np
from PIL import Image

from clipcluster.runs import files
from jobs.report.gallery import SIDE, _data_url, gallery_of, set_folders
from tests.jobs.report.example_runs import COLOURS, details, made, preempted, shards


def colour_of(url):
    image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
    assert max(image.size) == SIDE
    mean = np.asarray(image, dtype=float).mean(axis=(0, 1))
    return min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum())


def test_every_image_is_the_one_with_its_key(tmp_path):
    gallery = gallery_of(preempted(tmp_path))
    assert gallery.notes == []
    images = gallery.images["colours"]
    assert {key.partition("-")[0]: colour_of(url) for (_, key), url in images.items()} == {
        name: name for name in COLOURS
    }
    assert set(images) == {
        ("00000.tar", "red-0"),
        ("00001.tar", "green-0"),
        ("00001.tar", "green-1"),
        ("00002.tar", "blue-0"),
    }


def test_images_keep_within_the_bytes_of_a_page(tmp_path):
    run = preempted(tmp_path)
    whole = gallery_of(run).images["colours"]
    limit = sum(map(len, whole.values())) - 1
    gallery = gallery_of(run, image_bytes=limit)
    assert len(gallery.images["colours"]) == len(whole) - 1
    assert gallery.notes == ["colours: further images are left out; the page holds no more."]


def test_transparent_images_lie_on_white():
    for mode, colour in (("RGBA", (255, 0, 0, 0)), ("LA", (0, 0)), ("P", 0)):
        file = io.BytesIO()
        more = {"transparency": 0} if mode == "P" else {}
        Image.new(mode, (300, 200), colour).save(file, "PNG", **more)
        url = _data_url(file.getvalue())
        shown = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
        assert min(low for low, _ in shown.getextrema()) > 250, mode


def test_what_cannot_be_shown_is_said(tmp_path):
    run = preempted(tmp_path)
    details(run, 500, shard="gone.tar")
    assert set(gallery_of(run).images["colours"]) >= {("00000.tar", "red-0")}, (
        "another sample's shard is gone"
    )
    tar = tmp_path / "colours" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:-1024] + bytes(2048))
    gallery = gallery_of(run)
    assert "00001.tar changed since it was indexed" in gallery.notes[0]
    (tmp_path / "colours").rename(tmp_path / "away")
    gallery = gallery_of(run)
    assert gallery.details is not None
    assert gallery.images == {"colours": {}}
    assert f"there is no folder {tmp_path / 'colours'} on this machine" in gallery.notes[0]
    run.update_settings({})
    assert "the run's settings name no folder of the set colours" in gallery_of(run).notes[0]
    files.write_json(
        run.evals / "details-00000600.json", {"step": 600, "sets": {"colours": {"retrieval": 3}}}
    )
    assert (
        "details-00000600.json is not what this version reads: sets.colours.retrieval"
        in gallery_of(run).notes[0]
    )


def test_a_damaged_image_is_named_in_its_place(tmp_path):
    folder = tmp_path / "runs" / "a-00000000"
    shards(tmp_path / "colours")
    settings = {"evaluate": {"retrieval": [str(tmp_path / "colours")]}}
    run = made(folder, {}, settings)
    details(run, 1)
    tar = tmp_path / "colours" / "00000.tar"
    data = bytearray(tar.read_bytes())
    data[512:520] = b"notapng!"
    tar.write_bytes(data)
    from clipcluster.data.shards.indexing import index_folder

    index_folder(tmp_path / "colours")
    gallery = gallery_of(run)
    assert gallery.notes == []
    assert gallery.images["colours"]["00000.tar", "red-0"] == ""
    assert colour_of(gallery.images["colours"]["00002.tar", "blue-0"]) == "blue"


def test_sets_have_the_names_of_their_results():
    settings = {
        "evaluate": {"retrieval": ["${D}/coco/val", "${D}/flickr/val"], "zero_shot": ["s3://bucket/cars"]},
        "paths": {"evaluate.retrieval.0": "/d/coco/val", "evaluate.retrieval.1": "/d/flickr/val"},
    }
    assert set_folders(settings) == {
        "cars": "s3://bucket/cars",
        "coco-val": "/d/coco/val",
        "flickr-val": "/d/flickr/val",
    }
    # As a submission stores them: entries with keys of their own.
    given = {"shards": "${D}/cifar/test", "classnames": "zh.txt"}
    settings = {
        "evaluate": {
            "zero_shot": [{**given, "name": None}, {**given, "name": "zh"}],
            "probe": [{"train": "a", "test": "pets/test"}],
        },
        "paths": {"evaluate.zero_shot.0": "/d/cifar/test", "evaluate.zero_shot.1.shards": "/d/cifar/test"},
    }
    assert set_folders(settings) == {
        "cifar-test": "/d/cifar/test",
        "zh": "/d/cifar/test",
        "pets-test": "pets/test",
    }
