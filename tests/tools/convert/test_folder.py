"""`convert folder`: classes by ImageFolder's rule, splits, what is an image by content, keys."""

import io
import json
import os
from pathlib import Path

import pytest
import torchvision
from PIL import Image

from clipcluster.data.shards.open import open_folder
from clipcluster.errors import UserError
from tools.convert.convert import Conversion, convert
from tools.convert.readers.folder import FolderOptions


def picture(kind: str = "PNG", colour: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (colour, 100, 200)).save(file, kind)
    return file.getvalue()


def fill(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def made(root: Path, out: Path, **options: object) -> Conversion:
    return convert("folder", out, [root], FolderOptions(**options))  # type: ignore[arg-type]


def samples(folder: Path) -> dict[str, tuple[bytes, int]]:
    shards = open_folder(folder)
    read = [shards.read(position) for position in range(shards.n_samples)]
    return {sample.key: (sample.image, sample.cls) for sample in read}


def test_the_classes_are_those_of_torchvision(tmp_path: Path) -> None:
    names = ["b/1.png", "b/2.png", "a/z.png", "B/x.png", "10/1.png", "2/1.png", "é/1.png", "a/deep/er/1.png"]
    root = fill(tmp_path / "in", {name: picture(colour=number) for number, name in enumerate(names)})
    made(root, tmp_path / "out")
    theirs = torchvision.datasets.ImageFolder(str(root))
    assert (tmp_path / "out" / "classnames.txt").read_text().splitlines() == theirs.classes
    ours = samples(tmp_path / "out")
    assert dict(ours.values()) == {Path(path).read_bytes(): cls for path, cls in theirs.samples}


def test_an_image_is_one_by_content(tmp_path: Path) -> None:
    files = {
        "c/one.gif": picture("GIF"),
        "c/two.JPEG": picture("JPEG"),
        "c/three": picture("WEBP"),
        "c/four.jpg": picture("BMP"),
        "c/five.txt": picture("PNG"),
        "c/page.jpg": b"<html>404</html>",
        "c/empty.jpg": b"",
        "c/notes.txt": b"plain words",
        "c/.DS_Store": b"hidden",
    }
    root = fill(tmp_path / "in", files)
    (root / "c" / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(root / "c" / "pipe.jpg")
    done = made(root, tmp_path / "out")
    names = {"one": "one.gif", "two": "two.JPEG", "three": "three", "four": "four.jpg", "five": "five.txt"}
    assert {key: image for key, (image, _) in samples(tmp_path / "out").items()} == {
        f"c/{name}": files[f"c/{file}"] for name, file in names.items()
    }
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert {line["key"]: line["reason"].split(":")[0].split(" (")[0] for line in bad} == {
        "c/page": "HTML or XML, no image",
        "c/empty": "empty file",
        "c/notes": "no known kind of image",
        "c/gone": "no file",
        "c/pipe": "no file",
    }
    assert done.bad == {".": 5}
    assert done.splits["."].samples == 5


def test_every_name_gets_a_key_of_its_own(tmp_path: Path) -> None:
    names = [
        "c/a.png",
        "c/a.gif",
        "c/a_png.gif",
        "c/b.v2.png",
        "c/b_v2.png",
        "c/é" + "x" * 150 + ".png",
        "c.d/a.png",
    ]
    root = fill(tmp_path / "in", {name: picture(colour=number) for number, name in enumerate(names)})
    assert made(root, tmp_path / "out").bad == {".": 0}
    found = samples(tmp_path / "out")
    assert set(found) == {"c/a", "c/a_png", "c/a_png_gif", "c/b_v2", "c/b_v2_png", "c/é" + "x" * 150, "c.d/a"}
    assert {image for image, _ in found.values()} == {picture(colour=number) for number in range(len(names))}


def test_train_and_test_are_splits_with_one_numbering(tmp_path: Path) -> None:
    root = fill(
        tmp_path / "in",
        {"train/cat/1.png": picture(), "train/dog/1.png": picture(), "test/dog/1.png": picture()},
    )
    done = made(root, tmp_path / "out", template=("a {c}", "the {c}"))
    assert set(done.splits) == {"train", "test"}
    assert samples(tmp_path / "out" / "test")["dog/1"][1] == 1
    shards = open_folder(tmp_path / "out" / "test")
    assert shards.read(0).captions == ["a dog", "the dog"]
    assert (shards.classnames, shards.templates) == (["cat", "dog"], ["a {c}", "the {c}"])


def test_classes_called_train_and_test_are_classes(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", {"train/1.png": picture(), "test/1.png": picture()})
    assert made(root, tmp_path / "out").splits["."].samples == 2
    assert (tmp_path / "out" / "classnames.txt").read_text() == "test\ntrain\n"


def test_files_beside_the_classes_are_told(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", {"cat/1.png": picture(), "README.md": b"x", "loose.png": picture()})
    assert "2 files in no class folder" in " ".join(made(root, tmp_path / "out").notes)


def test_a_link_back_to_a_folder_above_ends(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", {"cat/1.png": picture(), "cat/deep/2.png": picture()})
    (root / "cat" / "deep" / "up").symlink_to("..")
    (root / "dog").symlink_to("cat")
    assert made(root, tmp_path / "out").splits["."].samples == 4


@pytest.mark.parametrize("text", ["Katze\nHund\n", "dog\tHund\ncat\tKatze\nowl\tEule\n"])
def test_classnames_from_a_file(tmp_path: Path, text: str) -> None:
    root = fill(tmp_path / "in", {"cat/1.png": picture(), "dog/1.png": picture()})
    (tmp_path / "names.txt").write_text(text)
    made(root, tmp_path / "out", classnames=tmp_path / "names.txt")
    assert (tmp_path / "out" / "classnames.txt").read_text() == "Katze\nHund\n"


def test_errors_are_said(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", {"cat/1.png": picture(), "dog/1.png": picture()})
    (tmp_path / "names.txt").write_text("Katze\n")
    for where, options, words in [
        (tmp_path / "nowhere", {}, "is not a folder"),
        (root / "cat", {}, "no class folders"),
        (root, {"template": ("a cat",)}, "{c}"),
        (root, {"classnames": tmp_path / "names.txt"}, "1 lines for 2"),
        (root, {"classnames": tmp_path / "none.txt"}, "none.txt"),
        (root, {"classnames": root / "cat" / "1.png"}, "--classnames .*1.png: .*give a file of UTF-8 lines"),
    ]:
        with pytest.raises(UserError, match=words):
            made(where, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
