"""Starter recipes for shards that are there: each passes the check."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from clipcluster.check import plain
from clipcluster.errors import UserError
from clipcluster.recipe.load import load
from jobs.init import write_starter
from tests.shard_writer import ShardWriter


def png(number: int) -> bytes:
    """A small picture of one grey."""
    out = io.BytesIO()
    Image.new("L", (9, 7), number).save(out, "png")
    return out.getvalue()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def checked(file: Path) -> plain.Checked:
    found = plain.check(file)
    assert (found.errors, found.warnings) == ([], [])
    return found


def test_captions_and_classes_become_a_contrastive_run_with_zero_shot(digits: Path) -> None:
    file, said = write_starter("first", parent=None, data=digits)
    assert file == Path("first.yaml")
    assert said[0] == f"{digits}/train: 1,437 samples, 1,437 with captions, 10 classes, about 8 pixels"
    recipe = checked(file).recipe
    assert (recipe.name, recipe.task, recipe.data.image.size) == ("first", "contrastive", 32)
    assert recipe.evaluate.retrieval == (f"{digits}/test",)
    assert [chosen.shards for chosen in recipe.evaluate.zero_shot] == [f"{digits}/test"]
    assert all("#" in line for line in file.read_text().splitlines() if "lr:" in line or "batch_size" in line)


def test_what_is_there_is_not_overwritten(digits: Path) -> None:
    file, _ = write_starter("first", parent=None, data=digits)
    before = file.read_text()
    with pytest.raises(UserError, match=r"first.yaml exists and is left as it is"):
        write_starter("first", parent=None, data=digits)
    assert file.read_text() == before


def test_another_recipe_with_other_data(digits: Path, folder: Path) -> None:
    """One of those that come along, by its name; its own settings stay, the metric of its data does not."""
    shutil.copytree(digits / "test", folder / "mine" / "val")
    shutil.copytree(digits / "train", folder / "mine" / "train")
    recipe = checked(write_starter("a", parent=Path("digits-classify.yaml"), data=folder / "mine")[0]).recipe
    assert (recipe.task, recipe.optim.lr, recipe.checkpoint.keep.best) == ("classify", 3e-3, None)
    assert recipe.evaluate.classification == (f"{folder}/mine/val",)
    assert recipe.data.train[0].shards == f"{folder}/mine/train"
    (folder / "own.yaml").write_text((folder / "a.yaml").read_text() + "seed: 3\n")
    recipe = checked(write_starter("b", parent=Path("own.yaml"), data=None)[0]).recipe
    assert (recipe.name, recipe.seed, recipe.task) == ("b", 3, "classify")
    (folder / "own.yaml").write_text("extends: digits.yaml\ntask: classfy\n")
    with pytest.raises(UserError, match=r"own\.yaml:2: task: classfy is none of contrastive, classify"):
        write_starter("c", parent=Path("own.yaml"), data=folder / "mine")


def test_which_captions_are_read_stays(digits: Path, folder: Path) -> None:
    choices = '{default: 0.5, "syn.json:syn_text": 0.5}'
    one = f"{{shards: x, captions_in: {choices}}}"
    for name, sources, kept in (
        ("a", one, {"default": 0.5, "syn.json:syn_text": 0.5}),
        ("b", f"{one}, {one}", {"default": 0.5, "syn.json:syn_text": 0.5}),
        ("c", "{shards: x, captions_in: '${CHOICE:-txt}'}, {shards: y}", "txt"),
        ("d", "{shards: x}", None),
    ):
        (folder / "own.yaml").write_text(f"extends: digits.yaml\ndata: {{train: [{sources}]}}\n")
        file, _ = write_starter(name, parent=Path("own.yaml"), data=digits)
        assert load(file).recipe.data.train[0].captions_in == kept
        assert ("differs between the sources" in file.read_text()) == (name == "c")


@pytest.mark.parametrize("name", ["2026", "1e3", "true", "digits"])
def test_names_that_yaml_takes_for_numbers_or_that_the_parent_has(digits: Path, name: str) -> None:
    for data in (digits, None):
        file, _ = write_starter(name, parent=Path("digits.yaml"), data=data)
        assert load(file, ["data.train.0.shards=x"]).recipe.name == name
        file.unlink()
    assert checked(write_starter(name, parent=None, data=digits)[0]).recipe.name == name


@pytest.mark.parametrize("named", [True, False])
def test_classes_alone_become_a_classifier(folder: Path, named: bool) -> None:
    with ShardWriter(folder / "set") as shards:
        for number in range(40):
            shards.add_members(f"{number}", {"png": png(number), "cls": b"%d" % (number % 3)})
    if named:
        (folder / "set/classnames.txt").write_text("a\nb\nc\n")
    recipe = checked(write_starter("c", parent=None, data=folder / "set")[0]).recipe
    assert (recipe.task, recipe.model.classes) == ("classify", None if named else 3)
    assert recipe.evaluate.classification == ()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x", None, "init needs --data, a folder of shards, or --from"),
        ("-x", "set", "'-x' cannot name a run"),
        ("x" * 101, "set", "cannot name a run; use at most 100"),
        ("x", "none", "no such folder"),
        ("x", "s3://bucket/set", "give a folder on this machine"),
        ("x", "set", "clipcluster shards index"),
    ],
)
def test_what_cannot_be_written(folder: Path, name: str, data: str | None, said: str) -> None:
    (folder / "set").mkdir()
    (folder / "set/0.tar").write_bytes(bytes(1024))
    with pytest.raises(UserError, match=said):
        write_starter(name, parent=None, data=data)
    assert list(folder.glob("*.yaml")) == []


def test_images_that_cannot_be_opened_are_left_to_the_check(folder: Path) -> None:
    """One of too many pixels among them, which Pillow refuses in its own way."""
    huge = png(0)[:16] + (100_000).to_bytes(4, "big") * 2 + png(0)[24:29]
    huge += zlib.crc32(huge[12:29]).to_bytes(4, "big") + png(0)[33:]
    with ShardWriter(folder / "set") as shards:
        for number, data in enumerate([b"no image", huge, png(1)]):
            shards.add_members(f"{number}", {"png": data, "cls": b"0"})
    _, (said,) = write_starter("x", parent=None, data=folder / "set")
    assert said.endswith("3 samples, 1 class, about 7 pixels")


def test_sets_to_evaluate_on_are_not_trained_on(digits: Path, folder: Path) -> None:
    for name in ("val", "test"):
        shutil.copytree(digits / "test", folder / "only" / name)
    with pytest.raises(UserError, match="there is no folder train; give the folder of shards to train on"):
        write_starter("x", parent=None, data=folder / "only")


def test_shards_to_train_on_need_captions_or_classes(folder: Path) -> None:
    with ShardWriter(folder / "set") as shards:
        shards.add_members("0", {"png": png(0)})
    with pytest.raises(UserError, match="needs samples with captions, or a class for each"):
        write_starter("x", parent=None, data=folder / "set")


def test_the_command_says_what_it_found_and_what_comes_next(digits: Path, folder: Path) -> None:
    code = (
        "import sys; from jobs.cli.app import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules, 'torch was loaded'"
    )
    words = ["init", "first", "--data", str(digits)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        "wrote first.yaml\n  clipcluster check first.yaml --deep\n  clipcluster submit first.yaml"
        in done.stdout
    )


@pytest.mark.long
def test_the_deep_check_passes(digits: Path) -> None:
    from clipcluster.check import deep

    file, _ = write_starter("first", parent=None, data=digits)
    found = deep.check(checked(file).recipe)
    assert (found.errors, found.warnings) == ([], [])
