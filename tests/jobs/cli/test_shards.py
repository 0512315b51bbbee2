"""`clipcluster shards stats` and `verify` as users type them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shard_writer import ShardWriter
from tools.convert.convert import KINDS

ROOT = Path(__file__).resolve().parents[3]
JPEG = b"\xff\xd8\xff\xe0"  # enough for its kind


def clipcluster(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", "shards", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "s", samples_per_shard=3) as writer:
        for number in range(5):
            writer.add(f"k{number}", JPEG + bytes([number]), "jpg", ["a [bold]caption", "another"])
    return tmp_path / "s"


@pytest.mark.parametrize("verb", ["stats", "verify"])
def test_json_is_one_object_for_one_folder_and_a_list_for_several(folder: Path, verb: str) -> None:
    done = clipcluster(verb, folder, "--no-images", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    wanted = {"shards": 2, "samples": 5, "used": 5, "captions": 10, "kinds": {"JPEG": 5}, "bad": []}
    assert {name: document[name] for name in wanted} == wanted
    assert document["bytes"] == sum(path.stat().st_size for path in folder.glob("*.tar"))
    several = json.loads(clipcluster(verb, folder, folder, "--no-images", "--json").stdout)
    assert several == [document, document]


@pytest.mark.parametrize("verb", ["stats", "verify", "index"])
@pytest.mark.parametrize(
    ("names", "found"), [(("only",), ["only"]), (("test", "train"), ["train", "test"]), (("a", "b"), None)]
)
def test_shards_one_folder_down_are_found(
    folder: Path, tmp_path: Path, verb: str, names: tuple[str, ...], found: list[str] | None
) -> None:
    for name in names:
        shutil.copytree(folder, tmp_path / "above" / name, copy_function=shutil.copy2)
    options = [] if verb == "index" else ["--no-images"]
    done = clipcluster(verb, tmp_path / "above", *options, "--json")
    if found is None:
        assert done.returncode == 2
        assert "the shards are in its folders a, b; give one of them" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    documents = json.loads(done.stdout)
    documents = documents if isinstance(documents, list) else [documents]
    assert [Path(document["folder"]).name for document in documents] == found


def test_verify_exits_with_1_until_it_is_repaired(folder: Path) -> None:
    path = folder / "00000.tar"
    path.write_bytes(path.read_bytes()[:-2000])
    done = clipcluster("verify", folder, "--no-images")
    assert (done.returncode, done.stderr) == (1, "")
    assert "1 broken shard, 0 bad samples" in done.stdout
    assert "00000.tar: changed since it was indexed" in done.stdout
    done = clipcluster("verify", folder, "--no-images", "--repair")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("repaired  00000.tar: ")
    assert "00000.tar.broken" in done.stdout
    assert "4 samples (4 JPEG) with 8 captions in 2 shards, whole" in done.stdout


def test_what_cannot_be_decoded_is_counted_and_named(folder: Path) -> None:
    done = clipcluster("stats", folder, "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0
    assert [(bad["shard"], bad["key"]) for bad in document["bad"]][::4] == [
        ("00000.tar", "k0"),
        ("00001.tar", "k4"),
    ]
    assert (document["used"], document["samples"]) == (0, 5)


def test_the_table(folder: Path) -> None:
    done = clipcluster("stats", folder, "--no-images")
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("JPEG: 5", "10 (choice default)", "characters"):
        assert part in done.stdout
    assert " \n" not in done.stdout


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["stats", "nowhere"], "no such folder"),
        (["stats", "FOLDER/00000.tar"], "is a file; give a folder"),
        (
            ["verify", "s3://bucket/shards"],
            "DIR s3://bucket/shards: not a path of this machine; copy the shards here",
        ),
        (
            ["convert", "folder", "http://host/x", "--out", "x"],
            "INPUT http://host/x: not a path of this machine; copy the data here",
        ),
        (
            ["convert", "folder", "FOLDER", "--out", "s3://b/x"],
            "--out s3://b/x: not a path of this machine; give a folder of this machine, and copy it there",
        ),
        (["convert", "folder", "FOLDER", "--out", "x", "--resize-mode", "round"], "keep_ratio_smallest"),
        (
            ["convert", "folder", "FOLDER", "--out", "x", "--bytes-per-shard", "some"],
            "--bytes-per-shard 'some'",
        ),
        (["convert", "folder", "FOLDER", "--out", "x", "--executor", "moon"], "slurm"),
        (["convert", "folder", "FOLDER", "--out", "x", "--jobs", "2"], "--jobs goes with --executor slurm"),
        (["stats", "FOLDER", "--picture", "x.doc"], "ends in .png"),
        (["stats", "FOLDER", "FOLDER", "--index", "x"], "2 were given"),
        (["stats", "FOLDER", "--captions", "jsn:x"], "no such choice"),
        (["verify", "nowhere", "--repair"], "no such folder"),
    ],
)
def test_wrong_input(folder: Path, words: list[str], part: str) -> None:
    done = clipcluster(*(word.replace("FOLDER", str(folder)) for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_the_help_names_every_kind() -> None:
    for words in ((), ("--help",)):
        done = clipcluster("convert", *words)
        assert all(f" {kind} " in done.stdout + done.stderr for kind in KINDS)
    said = clipcluster("convert", "folder", "--help").stdout
    assert " MODE " in said
    assert " WHERE " in said
    assert said.index("--out ") < said.index("--classnames")
    assert "--min-side" in clipcluster("reshard", "--help").stdout
    assert "--resize" not in clipcluster("reshard", "--help").stdout


def test_a_conversion_without_a_good_sample_ends_with_the_reason(tmp_path: Path) -> None:
    table = tmp_path / "x.csv"
    table.write_text("filepath,title,label\na.jpg,one,cat\n")
    (tmp_path / "a.jpg").write_bytes(JPEG)
    for _ in range(2):  # found finished, it says the same
        done = clipcluster("convert", "csv", table, "--class-column", "label", "--out", tmp_path / "out")
        assert done.returncode == 2
        assert "none of the 1 samples can be used" in done.stderr
        assert "not a class number" in done.stderr


def test_what_the_file_system_refuses_is_one_message(tmp_path: Path, folder: Path) -> None:
    done = clipcluster("index", "x" * 300)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: xxx")
    assert "give a shorter name" in done.stderr
    (tmp_path / "file").touch()
    done = clipcluster("index", folder, "--index", tmp_path / "file")
    assert done.returncode == 2
    assert "a file has this name; give a folder" in done.stderr
