"""Images found by text and by image, and the index that is kept of a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clipcluster
from clipcluster.build.loaded import DualEncoderModel
from clipcluster.errors import UserError
from clipcluster.runs.folder import Run
from jobs.cli.app import command_for
from tests.tiny_run import picture, write_run, write_shards
from tools.search import index as module
from tools.search.images import Place
from tools.search.page import page
from tools.search.search import Answers, nearest, search


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("search")
    return write_run(folder / "runs" / "tiny-00000000", folder / "unused")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten pictures, two of them below, one named as what it is not; a shard; damaged ones; other files."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for number in range(8):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / "below" / "8.jpg").write_bytes(picture(8, kind="GIF"))
    (folder / "below" / "no extension").write_bytes(picture(9, kind="JPEG"))
    write_shards(folder / "shards", 3)
    (folder / "page.jpg").write_bytes(b"<html>")
    (folder / "cut.jpg").write_bytes(picture(0, kind="JPEG")[:200])
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(picture(10))
    return folder


@pytest.fixture
def find(run: Run, photos: Path) -> Callable[..., Answers]:
    def with_defaults(texts: list[str] = ["a cat"], images: list[Path] = [], **more: Any) -> Answers:  # noqa: B006
        options = {"count": 5, "runs": run.path.parent, "say": pytest.fail, **more}
        return search("tiny", options.pop("folder", photos), texts, images, **options)

    return with_defaults


def test_the_nearest_images_by_text_and_by_image(
    find: Callable[..., Answers], run: Run, photos: Path
) -> None:
    answers = find(["a cat", "an owl"], [photos / "3.png"])
    assert (answers.model, answers.step, answers.searched, answers.encoded) == ("tiny-00000000", 8, 13, 13)
    assert {(bad.file, bad.key) for bad in answers.bad} == {("page.jpg", ""), ("cut.jpg", "")}
    model = clipcluster.load(run.path)
    names = [f"{number}.png" for number in range(8)] + ["below/8.jpg", "below/no extension"]
    files = [(photos / name).read_bytes() for name in names] + [picture(number) for number in range(3)]
    shown = [(name, "") for name in names] + [("shards/00000.tar", f"s{n:03d}") for n in range(3)]
    features = model.encode_image(files).double().cpu()
    queries = torch.cat([model.encode_text(["a cat", "an owl"]), model.encode_image(photos / "3.png")])
    for query, scores in zip(answers.queries, (queries.double().cpu() @ features.T), strict=True):
        expected = {shown[at]: scores[at].item() for at in range(13)}
        assert len(query.hits) == 5
        for hit in query.hits:
            assert hit.score == pytest.approx(expected[hit.place.file, hit.place.key], abs=1e-5)
        assert query.hits[-1].score == pytest.approx(sorted(expected.values())[-5], abs=1e-5)
        assert [hit.score for hit in query.hits] == sorted((hit.score for hit in query.hits), reverse=True)
    first = answers.queries[2].hits[0]
    assert (first.place.file, first.score) == ("3.png", pytest.approx(1.0, abs=1e-6))


def test_the_index_is_brought_up_to_date(
    find: Callable[..., Answers], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = find()
    assert find().encoded == 0
    assert find() == Answers(**{**vars(before), "encoded": 0})
    (photos / "new.png").write_bytes(picture(20))
    (photos / "0.png").unlink()
    (photos / "1.png").write_bytes(picture(21))
    (photos / "cut.jpg").write_bytes(picture(0, kind="JPEG"))
    later = (photos / "2.png").stat().st_mtime_ns + 1
    os.utime(photos / "2.png", ns=(later, later))
    write_shards(photos / "shards", 4)
    (photos / "closed.png").write_bytes(picture(23))  # alike no other: order among equals is not asked
    opened = module.images_in

    def closed(folder: Path, name: str) -> Any:
        if name == "closed.png":
            raise PermissionError(13, "Permission denied", name)
        return opened(folder, name)

    monkeypatch.setattr(module, "images_in", closed)
    answers = find(count=100)
    assert answers.encoded == 4 + 4  # new, 1, 2, cut; the shard's four
    assert {bad.file: bad.reason for bad in answers.bad} == {
        "page.jpg": "HTML or XML, no image",
        "closed.png": "cannot be read: Permission denied",
    }
    monkeypatch.setattr(module, "images_in", opened)
    again = find(count=100)
    assert (again.encoded, [bad.file for bad in again.bad]) == (1, ["page.jpg"])
    shutil.rmtree(photos / module.BESIDE)
    fresh = find(count=100)
    assert fresh.encoded == fresh.searched == again.searched == 16
    assert [hit.place for hit in fresh.queries[0].hits] == [hit.place for hit in again.queries[0].hits]
    scores = [[hit.score for hit in answers.queries[0].hits] for answers in (fresh, again)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_no_model_uses_the_features_of_another(
    find: Callable[..., Answers], run: Run, photos: Path, tmp_path: Path
) -> None:
    averaged, raw = find(), find(weights="raw")
    assert raw.encoded == raw.searched
    assert averaged.index != raw.index
    assert find().encoded == find(weights="raw").encoded == 0
    shutil.copy(averaged.index, raw.index)  # even so
    told: list[str] = []
    mended = find(weights="raw", say=told.append)
    assert mended.encoded == mended.searched
    assert mended.queries == raw.queries
    assert "is not used: it was made for another model" in told[0]
    for damage in (b"", b"PK\x03\x04" + bytes(50), averaged.index.read_bytes()[:-700]):
        averaged.index.write_bytes(damage)
        assert find(say=told.append).queries == averaged.queries
    assert len(told) == 4
    for change in (
        {"format": 1},
        {"files": 3},
        {"images": [[-1, "", 0, 1]] * raw.searched},
        {"images": [[0, "", 0, 10**15]] * raw.searched},
        {"images": [[10**6, "", 0, 1]] * raw.searched},
        {"images": []},
        {"bad": [["only", "two"]]},
    ):
        with np.load(raw.index) as stored:
            features, about = stored["features"], json.loads(stored["about"].tobytes())
        text = np.frombuffer(json.dumps({**about, **change}).encode(), np.uint8)
        np.savez(raw.index, features=features, about=text)
        assert find(weights="raw", say=told.append).queries == raw.queries, change
    for features in (np.zeros((raw.searched, 3), np.float32), np.array([{}])):  # the last one is a pickle
        np.savez(raw.index, features=features, about=text)
        assert find(weights="raw", say=told.append).queries == raw.queries
    np.save(raw.index.with_suffix(".npy"), features, allow_pickle=True)
    raw.index.with_suffix(".npy").rename(raw.index)
    assert find(weights="raw", say=told.append).queries == raw.queries
    assert len(told) == 4 + 7 + 3
    elsewhere = find(index=tmp_path / "kept" / "here")
    assert elsewhere.encoded == elsewhere.searched
    assert elsewhere.index.parent == tmp_path / "kept" / "here"
    other = shutil.copytree(photos, tmp_path / "others", ignore=shutil.ignore_patterns(module.BESIDE))
    assert find(folder=other, index=tmp_path / "kept" / "here").index != elsewhere.index
    assert not (other / module.BESIDE).exists()


def test_an_interrupted_search_continues(
    find: Callable[..., Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_S", 0.0)
    monkeypatch.setattr(module, "_GROUP", 4)
    encode, calls = DualEncoderModel.encode_image, []

    def dying(model: DualEncoderModel, images: Any, **more: Any) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(model, images, **more)

    monkeypatch.setattr(DualEncoderModel, "encode_image", dying)
    with pytest.raises(KeyboardInterrupt):
        find()
    answers = find()
    assert answers.searched == 13
    assert answers.encoded == 13 - sum(calls[:2])


def test_links_folders_that_are_closed_and_names_that_are_no_text(
    find: Callable[..., Answers], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "loop").symlink_to(photos)
    (photos / "itself.png").symlink_to(photos / "itself.png")
    (photos / "gone.png").symlink_to(photos / "nothing")
    (photos / "link.png").symlink_to(photos / "3.png")
    os.mkfifo(photos / "pipe.png")
    named = os.fsencode(photos) + b"/caf\xe9.png"
    Path(os.fsdecode(named)).write_bytes(picture(40))
    (photos / "closed").mkdir()
    look, closed = os.scandir, "closed"

    def refusing(place: Any) -> Any:
        if os.path.basename(place) == closed:
            raise PermissionError(13, "Permission denied", str(place))
        return look(place)

    monkeypatch.setattr(os, "scandir", refusing)
    monkeypatch.chdir(photos.parent)
    answers = find(folder=Path("photos"), count=100)
    assert answers.searched == 13 + 2, "the link to a file, and the name that is no text"
    assert {bad.file: bad.reason for bad in answers.bad}.keys() == {
        *("cut.jpg", "page.jpg"),
        *("closed", "itself.png"),
    }
    again = find(count=100)
    assert again.encoded == 0
    assert again.bad == answers.bad
    assert (b"caf?.png" in page(answers), str(photos) in page(again).decode()) == (True, True)


def test_two_searches_at_once_and_images_that_change_behind_them(
    find: Callable[..., Answers], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, inner = DualEncoderModel.encode_image, list[Answers]()

    def meanwhile(model: DualEncoderModel, images: Any, **more: Any) -> torch.Tensor:
        monkeypatch.setattr(DualEncoderModel, "encode_image", encode)
        inner.append(find())
        return encode(model, images, **more)

    monkeypatch.setattr(DualEncoderModel, "encode_image", meanwhile)
    answers = find(count=100)
    assert inner[0].queries[0].hits == answers.queries[0].hits[:5]
    assert find().encoded == 0
    (photos / "0.png").unlink()
    (photos / "1.png").write_bytes(b"<html>")
    assert page(answers).count(b"changed since it was found") == 2


def test_equal_scores_come_in_order() -> None:
    features = np.float32([[1, 0], [0, 1], [1, 0], [0.5, 0.5]])
    places = [Place(name, "", 0, 1) for name in "abcd"]
    found = nearest(features, np.float32([1, 0]), places, 3)
    assert [(hit.place.file, hit.score) for hit in found] == [("a", 1.0), ("c", 1.0), ("d", 0.5)]


def test_the_command(run: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "<b>&.png").write_bytes(picture(30))
    (tmp_path / "empty").mkdir()
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.jpg").write_bytes(b"<html>")
    words = ["search", run.path, "--images", photos, "--text", "a <cat>", "--image", photos / "<b>&.png"]
    file = tmp_path / "found.html"

    def said(*more: Any) -> str:
        command_for(["search"]).main([str(word) for word in (*words, *more)], standalone_mode=False)
        return capsys.readouterr().out

    text = said("-k", 3, "--out", file)
    assert re.search(r"text: a <cat>\n( +-?0\.\d{4}  .+\n){3}image: ", text)
    assert "  1.0000  <b>&.png\n" in text
    assert "not used: page.jpg: HTML or XML, no image\n" in text
    assert text.endswith(f"searched 14 images, 14 of them new\nwrote {file}\n")
    document = json.loads(said("--json"))
    assert (document["searched"], document["encoded"], len(document["bad"])) == (14, 0, 2)
    assert document["queries"][0]["text"] == "a <cat>"
    assert document["queries"][1]["results"][0] == {"file": "<b>&.png", "key": None, "score": 1.0}
    assert len(document["queries"][1]["results"]) == 10
    html = file.read_text()
    assert "a &lt;cat&gt;" in html
    assert "&lt;b&gt;&amp;.png" in html
    assert "<b>&" not in html
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert len(sources) == 7  # three for each query, and the image that was asked for
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "default-src 'none'" in html
    assert (photos / "3.png").read_bytes() == picture(3)
    for more, told in (
        ((), "nothing to look for"),
        (("--text", "a", "--out", photos / "3.png"), r"ends in \.html"),
        (("--text", "a", "--out", tmp_path / "none" / "x.html"), "none is not a folder; make it"),
        (("--text", "a", "--out", "/proc/x.html"), r"--out /proc/x\.html: cannot be written \(No such file"),
        (("--image", tmp_path / "none.png"), r"none\.png is not a file"),
        (("--text", " "), "--text is empty"),
        (("--image", photos / "page.jpg"), r"page\.jpg: HTML or XML, no image"),
    ):
        words[4:] = [str(word) for word in more]
        with pytest.raises(UserError, match=told):
            said()
    for name, told in (
        ("nowhere", "nowhere is not a folder"),
        ("empty", "empty has no image; name"),
        ("pages", r"pages has no image that can be used \(a\.jpg: HTML or XML, no image\)"),
    ):
        words[3:] = [tmp_path / name, "--text", "a"]
        with pytest.raises(UserError, match=told):
            said()


@pytest.mark.long
def test_a_page_on_a_phone_and_a_desk(
    find: Callable[..., Answers], photos: Path, tmp_path: Path, looked_at: Any, opened: Any
) -> None:
    (photos / f"{'long' * 50}.png").write_bytes(picture(30))
    (photos / f"{'x' * 200}.jpg").write_bytes(b"<html>")
    (photos / "\u202e<script>alert(1)<.png").write_bytes(picture(31))
    texts = [f"</title><script>alert(1)</script> {'x' * 3000}", "\u05d0\u05d1"]
    answers = find(texts, [photos / "3.png"], count=20)
    file = tmp_path / "elsewhere" / "found.html"
    file.parent.mkdir()
    file.write_bytes(page(answers))
    looked_at(file)
    with opened(file) as shown:
        assert shown.title() == "Search: photos"
        images = shown.locator("img")
        assert images.count() == 3 * 15 + 1
        assert all(images.evaluate_all("all => all.map(image => image.complete && image.naturalWidth > 0)"))
        assert shown.locator("h2").all_inner_texts()[1:] == [
            "\u05d0\u05d1",
            str(photos / "3.png"),
            "Could not be used",
        ]
