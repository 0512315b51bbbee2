"""Conversion: the same bytes however it is done, gone on with after a kill, nothing lost and nothing half."""

import errno
import io
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipcluster.data.shards.indexing import index_folder
from clipcluster.data.shards.open import open_folder
from clipcluster.data.shards.shard_list import read_summary
from clipcluster.data.shards.tar import header, scan
from clipcluster.errors import UserError
from tools.convert import convert as conversion
from tools.convert import plan as planning
from tools.convert import pool as processes
from tools.convert import work as making
from tools.convert.convert import Conversion, Settings, convert
from tools.convert.plan import Shard
from tools.convert.readers.folder import FolderOptions
from tools.convert.records import BadRecord, Kind, NoOptions, Record, Source
from tools.convert.shard_writer import header_parts

ROOT = Path(__file__).resolve().parents[3]
JPEG = b"\xff\xd8\xff\xe0"


class Numbers:
    """A split whose sample i has the key `keys[i]`; a key of None is a bad sample."""

    name = "train"
    files = {"notes.txt": "what this is\n"}  # noqa: RUF012
    account = None

    def __init__(self, keys: Sequence[str | None], size: int = 700) -> None:
        self._keys, self._size = keys, size

    def __len__(self) -> int:
        return len(self._keys)

    def sizes(self) -> np.ndarray:
        return np.full(len(self), self._size, np.int64)

    def read(self, number: int) -> Record:
        key = self._keys[number]
        if key is None:
            raise BadRecord(f"row {number}", "nothing there")
        image = JPEG + bytes([number % 256]) * (self._size - 4)
        return Record(
            key, image, [f"caption {number}", "zweite ü"], {"id": number}, number % 7, {"npz": b"x" * 5}
        )


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str | None]], None]:
    """Makes `convert("numbers", …)` read samples with the given keys."""

    def use(keys: Sequence[str | None]) -> None:
        kind = Kind("numbers", lambda inputs, options: Source([Numbers(keys)], []))
        monkeypatch.setattr(conversion, "kind_named", lambda name: kind)

    return use


def images(root: Path, count: int = 300) -> Path:
    for number in range(count):
        path = root / f"class-{number % 3}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if number == 77 else JPEG + random.Random(number).randbytes(500 + 40 * number))
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; of the lists, which hold times, what does not depend on them."""
    found = {}
    for path in folder.rglob("*"):
        if path.name == "index.json":
            document = json.loads(path.read_text())
            for shard in document["shards"]:
                del shard["mtime_ns"]
            found[str(path.relative_to(folder))] = json.dumps(document).encode()
        elif path.is_file() and path.name != "index.bin":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def folder_of(out: Path, root: Path, workers: int = 1, **settings: object) -> Conversion:
    options = FolderOptions(template=("a {c}",))
    return convert("folder", out, [root], options, Settings(**settings), workers=workers)  # type: ignore[arg-type]


def test_the_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    root = images(tmp_path / "in")
    done = folder_of(tmp_path / "one", root, samples_per_shard=40)
    assert (done.splits["."].samples, done.bad) == (299, {".": 1})
    for workers in (2, 5):
        folder_of(tmp_path / str(workers), root, workers, samples_per_shard=40)
        assert contents(tmp_path / str(workers)) == contents(tmp_path / "one")
    assert read_summary(tmp_path / "one").shards == 8


def test_the_index_is_that_of_a_scan(tmp_path: Path, numbers: Callable) -> None:
    numbers([f"k{number}" for number in range(50)])
    convert("numbers", tmp_path / "out", settings=Settings(samples_per_shard=20))
    index_folder(tmp_path / "out" / "train", tmp_path / "scan")
    for path in (tmp_path / "scan").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / "train" / path.name).read_bytes(), path.name
    assert (tmp_path / "out" / "train" / "notes.txt").read_text() == "what this is\n"


def test_shuffled_by_a_seed(tmp_path: Path, numbers: Callable) -> None:
    numbers([f"k{number:03d}" for number in range(100)])
    orders = []
    for name, seed in [("a", 1), ("b", 1), ("c", 2), ("d", None)]:
        convert("numbers", tmp_path / name, settings=Settings(samples_per_shard=30, shuffle=seed))
        shards = open_folder(tmp_path / name / "train")
        orders.append([shards.read(position).key for position in range(100)])
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert sorted(orders[0]) == sorted(orders[2]) == orders[3]


def test_shards_of_so_many_bytes(tmp_path: Path) -> None:
    root = images(tmp_path / "in")
    folder_of(tmp_path / "out", root, bytes_per_shard=300_000)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    images_in = [
        sum(member.size for member in scan(os.open(path, os.O_RDONLY)) if member.name.endswith("jpg"))
        for path in shards
    ]
    assert len(shards) > 5
    assert all(200_000 < size <= 300_000 for size in images_in[:-1])


def test_repeated_keys_are_left_out_and_counted(tmp_path: Path, numbers: Callable) -> None:
    keys: list[str | None] = [f"k{number}" for number in range(60)]
    keys[5], keys[33], keys[58], keys[40], keys[41] = "k3", "k3", "k12", None, "a.b"
    numbers(keys)
    for name, workers in (("one", 1), ("two", 3)):
        done = convert("numbers", tmp_path / name, settings=Settings(samples_per_shard=20), workers=workers)
        assert (done.splits["train"].samples, done.bad) == (55, {"train": 5})
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    lines = (tmp_path / "one" / "train" / "bad_samples.jsonl").read_text().splitlines()
    bad = {line["number"]: (line["key"], line["reason"].split(":")[0]) for line in map(json.loads, lines)}
    assert bad == {
        5: ("k3", "duplicate key"),
        33: ("k3", "duplicate key"),
        58: ("k12", "duplicate key"),
        40: ("row 40", "nothing there"),
        41: ("a.b", "no usable key"),
    }


def test_a_finished_one_is_left_and_another_refused(tmp_path: Path) -> None:
    root = images(tmp_path / "in", 30)
    assert folder_of(tmp_path / "out", root).made
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert not folder_of(tmp_path / "out", root).made
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    with pytest.raises(UserError, match=r"--samples-per-shard was 10000, is 7"):
        folder_of(tmp_path / "out", root, samples_per_shard=7)
    with pytest.raises(UserError, match=r"--template was \['a \{c\}'\], is \[\]"):
        convert("folder", tmp_path / "out", [root])
    with pytest.raises(UserError, match=r"input was \[.*/in'\], is \[.*/other'\]\. Give another --out"):
        folder_of(tmp_path / "out", images(tmp_path / "other", 30))
    (root / "class-1" / "0001.jpg").write_bytes(JPEG + b"other")
    with pytest.raises(UserError, match=r"class-1 was changed"):
        folder_of(tmp_path / "out", root)
    shutil.rmtree(root)
    assert not folder_of(tmp_path / "out", root).made  # the input may go once it is converted
    (tmp_path / "out" / "00000.tar").write_bytes(b"")
    with pytest.raises(Exception, match=r"00000.tar"):
        folder_of(tmp_path / "out", root)


def command(root: Path, out: Path, *more: str) -> list[str]:
    start = [sys.executable, "-m", "jobs.cli", "shards", "convert", "folder", str(root), "--out", str(out)]
    return [*start, "--samples-per-shard", "20", "--template", "a {c}", *more]


def killed_at(root: Path, out: Path, shards: int, workers: int) -> bool:
    """Starts a conversion and kills the command (not its workers) at so many shards; whether it was busy."""
    running = subprocess.Popen(
        command(root, out, "--workers", str(workers)), cwd=ROOT, stdout=subprocess.DEVNULL
    )
    while running.poll() is None and len(list(out.glob("*.tar"))) < shards:
        time.sleep(0.001)
    busy = running.poll() is None
    running.kill()
    running.wait()
    return busy


def check_after_kill(root: Path, out: Path, expected: dict[str, bytes]) -> None:
    """No half shard under a final name; then the same command ends with the same bytes."""
    for path in out.glob("*.tar"):
        assert path.read_bytes() == expected[path.name]
    subprocess.run(command(root, out, "--workers", "2"), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert contents(out) == expected


def test_a_killed_one_goes_on(tmp_path: Path) -> None:
    root = images(tmp_path / "in", 600)
    folder_of(tmp_path / "whole", root, samples_per_shard=20)
    expected = contents(tmp_path / "whole")
    busy = subprocess.Popen(
        command(root, tmp_path / "out", "--workers", "2"), cwd=ROOT, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/.conversion/*.json")) and time.monotonic() < deadline:
        time.sleep(0.001)
    busy.kill()
    busy.wait()
    done = len(list(tmp_path.glob("out/*.tar")))
    assert 0 < done <= 30
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out/.conversion/*.json")}
    check_after_kill(root, tmp_path / "out", expected)
    assert times  # what was finished before the kill was not written again
    for name in times:
        tar = tmp_path / "out" / f"{name[2:7]}.tar"
        assert tar.stat().st_mtime_ns <= times[name]


@pytest.mark.long
def test_killed_at_twenty_moments(tmp_path: Path) -> None:
    root = images(tmp_path / "in", 3000)
    subprocess.run(command(root, tmp_path / "whole", "--workers", "2"), cwd=ROOT, check=True)
    expected = contents(tmp_path / "whole")
    moments, busy = random.Random(20), 0
    for number in range(20):
        out = tmp_path / f"out-{number}"
        busy += killed_at(root, out, moments.randrange(1, 140), workers=1 + number % 2)
        check_after_kill(root, out, expected)
        shutil.rmtree(out)
    assert busy >= 10


def test_a_worker_that_is_killed_is_said(
    tmp_path: Path, numbers: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers([f"k{number}" for number in range(60)])
    read, parent = Numbers.read, os.getpid()

    def deadly(self: Numbers, number: int) -> Record:
        if number == 45 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, number)

    monkeypatch.setattr(Numbers, "read", deadly)
    with pytest.raises(UserError, match="SIGKILL"):
        convert("numbers", tmp_path / "out", settings=Settings(samples_per_shard=20), workers=2)
    monkeypatch.setattr(Numbers, "read", read)
    assert convert("numbers", tmp_path / "out", settings=Settings(samples_per_shard=20)).made
    assert not list(tmp_path.rglob("*.part"))


class OfTwoParts(Exception):
    """An exception of a library, which can be pickled and not unpickled."""

    def __init__(self, what: str, where: int) -> None:
        super().__init__(f"{what} at {where}")


def test_what_a_worker_raises_is_said_whatever_it_is(
    tmp_path: Path, numbers: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers([f"k{number}" for number in range(4)])

    def fails(self: Numbers, number: int) -> Record:
        raise OfTwoParts("damage", number)

    monkeypatch.setattr(Numbers, "read", fails)
    with pytest.raises(RuntimeError, match="OfTwoParts: damage at"):
        convert("numbers", tmp_path / "out", settings=Settings(samples_per_shard=2), workers=2)


def test_a_full_disk_is_said_and_gone_on_with(tmp_path: Path) -> None:
    """Files may not grow beyond 8 MB: the disk of a shard that is full in the middle of it."""
    root = tmp_path / "in"
    for number in range(24):
        (root / "c").mkdir(parents=True, exist_ok=True)
        size = 1 << 20 if number >= 12 else 1 << 10
        (root / "c" / f"{number:02d}.jpg").write_bytes(JPEG + random.Random(number).randbytes(size))
    words = [*command(root, tmp_path / "out", "--samples-per-shard", "12"), "--workers", "2"]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))

    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 2
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} <= {"00000.tar"}
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "out" / "index.bin").exists()
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    convert("folder", tmp_path / "whole", [root], FolderOptions(None, ("a {c}",)), Settings(12))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="no user namespaces",
)
def test_a_small_disk_that_is_full_in_the_middle(tmp_path: Path) -> None:
    """A tmpfs of 3 MB, mounted for the command alone; then made larger."""
    root, disk = images(tmp_path / "in", 600), tmp_path / "disk"
    disk.mkdir()
    convert_it = shlex.join(command(root, disk / "out", "--workers", "2"))
    script = f"""
        mount -t tmpfs -o size=3m tmpfs {disk}
        {convert_it} >/dev/null 2>{tmp_path}/said; echo $? >{tmp_path}/code
        cp -r {disk}/out {tmp_path}/full
        mount -o remount,size=100m {disk}
        {convert_it} >/dev/null && cp -r {disk}/out {tmp_path}/after
    """
    subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, check=True)
    assert (tmp_path / "code").read_text() == "2\n"
    said = (tmp_path / "said").read_text()
    assert "no space left" in said
    assert len(said.splitlines()) == 1
    folder_of(tmp_path / "whole", root, samples_per_shard=20)
    whole = contents(tmp_path / "whole")
    shards = [path for path in (tmp_path / "full").iterdir() if path.suffix == ".tar"]
    assert 0 < len(shards) < 30
    for path in shards:
        assert path.read_bytes() == whole[path.name]
    assert not list((tmp_path / "full").rglob("*.part"))
    after = {name: data for name, data in contents(tmp_path / "after").items() if name != "index.json"}
    assert {name: data for name, data in whole.items() if name != "index.json"} == after


@given(st.text(min_size=1, max_size=130), st.integers(0, 2 * 8**11))
def test_a_quick_header_is_a_header(name: str, size: int) -> None:
    path = name.replace("\0", "").encode("utf-8", "replace") or b"x"
    assert b"".join(header_parts(path, size)) == header(path.decode(), size)


@pytest.mark.parametrize("key", ["a.b", "", "__a__/b", "a/", "a\0"])
def test_a_key_that_cannot_be_read_back_is_refused(tmp_path: Path, numbers: Callable, key: str) -> None:
    numbers(["good", key])
    assert convert("numbers", tmp_path / "out").bad == {"train": 1}
    assert "no usable key" in (tmp_path / "out" / "train" / "bad_samples.jsonl").read_text()


def test_several_processes_may_work_and_finish(tmp_path: Path, numbers: Callable) -> None:
    """As an array of jobs does: each claims shards, all of them finish."""
    keys = [f"k{number}" for number in range(100)]
    numbers(keys)
    convert("numbers", tmp_path / "whole", settings=Settings(samples_per_shard=10))
    settings = Settings(samples_per_shard=10)
    plan = planning.plan(tmp_path / "out", "numbers", [], NoOptions(), settings, Source([Numbers(keys)], []))
    taken = []
    for share in range(3):
        making.work(plan, lambda shard, share=share: shard.number % 4 == share and not taken.append(shard))
        assert not making.finish(plan)
    making.work(plan, lambda shard: not taken.append(shard))
    assert len(taken) == len(set(taken)) == 10
    assert making.finish(plan)
    assert making.finish(plan)
    ours, theirs = contents(tmp_path / "out" / "train"), contents(tmp_path / "whole" / "train")
    assert ours == theirs


def test_a_process_whose_description_was_swept_by_the_one_that_finished(
    tmp_path: Path, numbers: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers(["a", "b"])
    plan = conversion.prepare("numbers", tmp_path / "out", [], NoOptions())
    write = making.write_json

    def write_and_sweep(path: Path, document: object) -> None:
        write(path, document)  # by the other process
        raise FileNotFoundError(errno.ENOENT, "swept", str(path))

    with conversion.begun(plan):
        making.work(plan, lambda shard: True)
        monkeypatch.setattr(making, "write_json", write_and_sweep)
        assert making.finish(plan)


def test_others_read_the_same(tmp_path: Path, numbers: Callable) -> None:
    """webdataset and the system's tar, names of every kind among the keys."""
    keys = [
        "plain",
        "sub/dir/é-ü",
        "長い名前" * 12,
        "x" * 99,
        "y" * 180,
        "p" * 90 + "/" + "q" * 90,
        "sp ace",
        "-rf",
    ]
    numbers(keys)
    convert("numbers", tmp_path / "out")
    tar = tmp_path / "out" / "train" / "00000.tar"
    expected = {}
    for number, key in enumerate(keys):
        record = Numbers(keys).read(number)
        expected[key] = {
            "jpg": record.image,
            "json": json.dumps({"captions": record.captions, "id": number}, ensure_ascii=False).encode(),
            "txt": b"caption %d" % number,
            "cls": b"%d" % (number % 7),
            "npz": b"xxxxx",
        }
    for sample in webdataset.WebDataset([str(tar)], shardshuffle=False, empty_check=False):
        members = expected[sample["__key__"]]
        assert {name: sample[name] for name in members} == members
    shards = open_folder(tar.parent)
    assert [shards.read(position).key for position in range(len(keys))] == keys
    assert all(shards.read(position).image == expected[key]["jpg"] for position, key in enumerate(keys))
    (tmp_path / "x").mkdir()
    done = subprocess.run(
        ["tar", "xf", tar, "-C", tmp_path / "x"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    for key, members in expected.items():
        for name, data in members.items():
            assert (tmp_path / "x" / f"{key}.{name}").read_bytes() == data


def test_resized(tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "c").mkdir(parents=True)
    noise = Image.effect_noise((300, 200), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    noise.save(root / "c" / "turned.jpg", exif=exif)
    noise.resize((40, 90)).save(root / "c" / "small.jpg")
    clear = noise.convert("RGBA")
    clear.putalpha(0)
    clear.save(root / "c" / "clear.png")
    clear.save(root / "c" / "clear_gif.gif", transparency=0)
    Image.new("I;16", (400, 100), 0x8000).save(root / "c" / "deep.tif")
    (root / "c" / "cut.jpg").write_bytes((root / "c" / "turned.jpg").read_bytes()[:3000])
    settings = Settings(resize=100)
    done = convert("folder", tmp_path / "out", [root], settings=settings, workers=2)
    convert("folder", tmp_path / "again", [root], settings=settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert done.bad == {".": 1}  # cut.jpg: what cannot be decoded cannot be resized
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        data = {info.name: tar.extractfile(info).read() for info in tar if not info.name.endswith("cls")}  # type: ignore[union-attr]
    sizes = {name: (*(image := Image.open(io.BytesIO(data[name]))).size, image.format) for name in data}
    assert sizes == {
        "c/turned.jpg": (67, 100, "JPEG"),
        "c/small.jpg": (40, 90, "JPEG"),
        "c/clear.png": (100, 67, "PNG"),
        "c/clear_gif.jpg": (100, 67, "JPEG"),
        "c/deep.jpg": (100, 25, "JPEG"),
    }
    assert data["c/small.jpg"] == (root / "c" / "small.jpg").read_bytes()
    assert Image.open(io.BytesIO(data["c/deep.jpg"])).getpixel((50, 12)) == 128


def test_every_kind_is_there() -> None:
    for name in conversion.KINDS:
        help_line = conversion.kind_named(name).help
        assert help_line
        assert "\n" not in help_line


def test_slow_samples_are_reported_as_they_are_done(tmp_path: Path, numbers: Callable) -> None:
    """Whoever is told may raise: a task that was asked to stop does not finish its shard first."""

    class Asked(Exception):
        pass

    class Slow(Numbers):
        def read(self, number: int) -> Record:
            read.append(number)
            time.sleep(0.05)
            return super().read(number)

    def report(samples: int) -> None:
        raise Asked

    read: list[int] = []
    numbers([f"k{number}" for number in range(100)])
    plan = conversion.prepare("numbers", tmp_path / "out", [], NoOptions())
    slow = replace(plan, splits=[Slow([f"k{number}" for number in range(100)])])
    with conversion.begun(slow), pytest.raises(Asked):
        making.work(slow, lambda shard: True, report)
    assert len(read) < 50
    assert not list((tmp_path / "out").rglob("*.part"))


def test_a_long_traceback_of_a_worker_is_shown_whole(
    tmp_path: Path, numbers: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than what a pipe takes in one piece, while the other worker reports too."""
    numbers([f"k{number}" for number in range(400)])

    def broken(self: Numbers, number: int) -> Record:
        raise RuntimeError("x" * 200_000 + f" the cause at {number}")

    monkeypatch.setattr(Numbers, "read", broken)
    monkeypatch.setattr(making, "_REPORT_SECONDS", 0)
    with pytest.raises(RuntimeError, match="the cause at") as caught:
        convert("numbers", tmp_path / "out", settings=Settings(samples_per_shard=20), workers=4)
    assert "in broken" in str(caught.value.__cause__)  # the worker's own traceback
    assert not list(tmp_path.rglob("*.part"))


def test_a_worker_killed_while_it_claims_keeps_nobody_waiting(
    tmp_path: Path, numbers: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers([f"k{number}" for number in range(6)])
    plan = conversion.prepare("numbers", tmp_path / "out", [], NoOptions(), Settings(samples_per_shard=1))
    killed, claim = tmp_path / "killed", processes._Job.claim

    def kill_the_first(job: processes._Job, shard: Shard) -> bool:
        try:
            killed.touch(exist_ok=False)
        except FileExistsError:
            return claim(job, shard)
        with job._taken.get_lock():
            os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    monkeypatch.setattr(processes._Job, "claim", kill_the_first)
    signal.alarm(30)  # what waits for the dead would wait for ever
    try:
        with conversion.begun(plan), pytest.raises(UserError, match="a worker was ended by SIGKILL"):
            processes.run(plan, 2)
    finally:
        signal.alarm(0)
    assert convert("numbers", tmp_path / "out", settings=Settings(samples_per_shard=1), workers=2).made
    assert len(list((tmp_path / "out" / "train").glob("*.tar"))) == 6


def test_workers_end_with_a_command_that_is_killed(
    tmp_path: Path, numbers: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one at work and the one that waits for the other's end."""
    numbers(["k0", "k1"])
    settings = Settings(samples_per_shard=1)
    plan = conversion.prepare("numbers", tmp_path / "out", [], NoOptions(), settings)
    read = Numbers.read

    def slowly(self: Numbers, number: int) -> Record:
        (tmp_path / f"{os.getpid()}.pid").touch()
        if number == 0:
            time.sleep(60)
        return read(self, number)

    monkeypatch.setattr(Numbers, "read", slowly)
    command = multiprocessing.get_context("fork").Process(target=processes.run, args=(plan, 2))
    command.start()
    wait_until(lambda: (tmp_path / "out" / "train" / "00001.tar").exists())
    command.kill()
    command.join()
    workers = [Path("/proc", path.stem, "stat") for path in tmp_path.glob("*.pid")]
    assert len(workers) == 2
    wait_until(lambda: all(not stat.exists() or ") Z " in stat.read_text() for stat in workers))


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)
