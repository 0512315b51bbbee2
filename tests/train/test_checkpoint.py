"""Checkpoints on disk: whole or not there, verified, set aside, never silently replaced by nothing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from clipcluster.errors import StaleAttempt
from clipcluster.recipe.sections.checkpoint import Best, Keep
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.checkpoints import newest_complete, read_manifest, steps_in
from clipcluster.runs.evaluations import owed_by
from clipcluster.runs.files import read_json, read_lines
from clipcluster.runs.folder import Run
from clipcluster.runtime.outcome import CheckpointError
from clipcluster.runtime.stop import Wish
from clipcluster.runtime.world import World
from clipcluster.train import checkpoint, checkpoint_writer
from clipcluster.train.checkpoint import Broken, CheckpointFolder, load_parts, reading, verify
from clipcluster.train.checkpoint_writer import Contents, Dropped, safetensors_bytes, take_copy
from clipcluster.train.progress import Progress
from clipcluster.train.records import Records
from clipcluster.train.saver import Saver, _Write, to_drop
from clipcluster.train.step import Guard

ALONE = World(0, 1, 0, torch.device("cpu"))


class Part:
    """A part with two tensors and a number."""

    def __init__(self, value: float = 0.0, size: int = 1000) -> None:
        self.tensor, self.count, self.number = torch.full((size,), value), torch.tensor(3), value

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "count": self.count, "number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensor, self.count, self.number = state["tensor"], state["count"], state["number"]


def at(step: int) -> Progress:
    progress = Progress(steps_per_epoch=10, batch_size=1)
    progress.step = progress.batches_drawn = step
    return progress


def contents(step: int, size: int = 1000) -> Contents:
    return take_copy(step, at(step).state_dict(), {"model": Part(float(step), size)})


def attempt_beside(path: Path, number: int = 1) -> Attempt:
    """An attempt of the run whose checkpoints are at `path`."""
    attempt = Attempt(path.parent / "attempts" / str(number))
    attempt.path.mkdir(parents=True, exist_ok=True)
    return attempt


def folder_at(path: Path) -> CheckpointFolder:
    folder = CheckpointFolder(attempt_beside(path), about={"world_size": 1})
    folder.prepare()
    return folder


def saver_of(folder: CheckpointFolder, keep: Keep | None = None, **when: Any) -> Saver:
    records = Records(folder.attempt, ALONE, samples=1, limit=0.0)
    return Saver(folder, records, keep=keep or Keep(), constants={}, **when)


def told(saver: Saver) -> list[tuple[str, int]]:
    """The events of the saves, each with its step."""
    lines = read_lines(saver.records.attempt.path / "events-rank-0.jsonl")
    return [(line["event"], line["step"]) for line in lines]


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    """Three checkpoints, steps 1 to 3."""
    made = folder_at(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        made.write(contents(step))
    return made


# The format


dtypes = st.sampled_from(
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    ]
)
shapes = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=12), st.tuples(dtypes, shapes), max_size=6))
def test_the_tensor_file_is_safetensors(layout: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    layout.pop("__metadata__", None)
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in layout.items()}
    read = load(b"".join(bytes(piece) for piece in safetensors_bytes(tensors)))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype is tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)


def test_a_tensor_that_is_no_block_of_memory_is_written_by_value() -> None:
    tensor = torch.arange(12).reshape(3, 4).T
    read = load(b"".join(bytes(piece) for piece in safetensors_bytes({"t": tensor})))
    assert torch.equal(read["t"], tensor)


def test_parts_go_round(folder: CheckpointFolder) -> None:
    state = verify(folder.path(2))
    part = Part()
    load_parts(folder.path(2), state, {"model": part})
    assert (float(part.tensor[5]), int(part.count), part.number) == (2.0, 3, 2.0)
    manifest = read_json(folder.path(2) / "manifest.json")
    assert manifest["world_size"] == 1
    assert set(manifest["files"]) == {"model.safetensors", "state.json"}
    guard = Guard(torch.device("cpu"), 3)  # of which checkpoints of before know nothing
    guard(torch.tensor(torch.nan), torch.tensor(True), 7)
    load_parts(folder.path(2), state, {"model": part, "guard": guard})
    assert guard.first_unread() is None
    with pytest.raises(CheckpointError, match="holds model; this run has model, other"):
        load_parts(folder.path(2), state, {"model": part, "other": Part()})


def test_later_steps_change_nothing_in_the_copy(tmp_path: Path) -> None:
    part = Part(1.0)
    copied = take_copy(1, {}, {"model": part})
    part.tensor.fill_(9.0)
    assert float(copied.tensors["model.safetensors"]["tensor"][0]) == 1.0


# Broken ones


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def flip(path: Path) -> None:
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def flip_state(path: Path) -> None:
    content = (path / "state.json").read_text()
    (path / "state.json").write_text(content.replace('"step": 3', '"step": 4'))


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def tear_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 40)


def lose_file(path: Path) -> None:
    (path / "model.safetensors").unlink()


BREAKS = {
    truncate: "has 4,1.. bytes, the manifest says",
    flip: "content of model.safetensors does not match the manifest",
    flip_state: "content of state.json does not match the manifest",
    lose_manifest: "manifest.json is missing",
    tear_manifest: "manifest.json is not valid JSON",
    lose_file: "model.safetensors is missing",
}


@pytest.mark.parametrize("harm", list(BREAKS), ids=lambda harm: harm.__name__)
def test_a_broken_one_is_set_aside_and_the_one_before_used(
    folder: CheckpointFolder, harm: Callable[[Path], None]
) -> None:
    harm(folder.path(3))
    with pytest.raises(Broken, match=BREAKS[harm]):
        verify(folder.path(3))
    assert folder.newest() == folder.path(2)
    assert folder.steps() == [1, 2]
    why = read_json(folder.folder / "broken-step-00000003-1" / "why.json")
    assert why["reason"]
    # The step is saved anew, and breaks anew: both broken ones stay to be looked at.
    folder.write(contents(3))
    harm(folder.path(3))
    assert folder.newest() == folder.path(2)
    assert (folder.folder / "broken-step-00000003-2").is_dir()


GARBAGE: list[Any] = [None, 3, "text", [], {}, [[]], {"a": 1}, {"files": 7}, -5, True, 1e308]
"""What a file may hold after a fault of the disk, of a program, or by intent."""


def rewrite(path: Path, value: Any) -> None:
    """Put `value` in a checkpoint's state.json, and its hash in the manifest."""
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    (path / "state.json").write_bytes(content)
    manifest = read_json(path / "manifest.json")
    manifest["files"]["state.json"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("entry", [(), ("files",), ("files", "state.json"), ("files", "state.json", "bytes")])
def test_garbage_in_the_manifest_is_broken(
    folder: CheckpointFolder, garbage: Any, entry: tuple[str, ...]
) -> None:
    manifest = read_json(folder.path(3) / "manifest.json")
    value = garbage
    if entry:
        inner = manifest
        for key in entry[:-1]:
            inner = inner[key]
        inner[entry[-1]] = garbage
        value = manifest
    (folder.path(3) / "manifest.json").write_text(json.dumps(value))
    assert newest_complete(folder.folder) == 2
    assert folder.newest() == folder.path(2)


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/b", "", ".", "..", "nul\0"])
def test_a_manifest_names_files_of_its_own_folder_alone(folder: CheckpointFolder, name: str) -> None:
    manifest = read_json(folder.path(3) / "manifest.json")
    manifest["files"][name] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (folder.path(3) / "manifest.json").write_text(json.dumps(manifest))
    assert newest_complete(folder.folder) == 2
    assert folder.newest() == folder.path(2)


@pytest.mark.parametrize("garbage", [*GARBAGE, b"", b"\xff\xfe", b'{"format": 1', b"[" * 100_000])
def test_garbage_as_the_state_is_broken(folder: CheckpointFolder, garbage: Any) -> None:
    rewrite(folder.path(3), garbage)
    assert folder.newest() == folder.path(2)
    assert "state.json" in read_json(folder.folder / "broken-step-00000003-1" / "why.json")["reason"]


@pytest.mark.parametrize("garbage", [value for value in GARBAGE if value not in ([], True)])
@pytest.mark.parametrize("key", ["step", "batches_drawn", "evaluated_step", "skipped", "parts", "format"])
def test_garbage_in_the_state_is_broken(folder: CheckpointFolder, garbage: Any, key: str) -> None:
    if key == "format" and isinstance(garbage, int):
        return  # of another version: refused, by another test
    state = read_json(folder.path(3) / "state.json")
    if isinstance(state[key], int) and garbage == 3:
        return
    rewrite(folder.path(3), {**state, key: garbage})
    assert folder.newest() == folder.path(2)
    reason = read_json(folder.folder / "broken-step-00000003-1" / "why.json")["reason"]
    assert key in reason
    assert "\n" not in reason


def test_all_broken_is_refused_and_touches_nothing(folder: CheckpointFolder) -> None:
    for step in (1, 2, 3):
        lose_manifest(folder.path(step))
    with pytest.raises(
        CheckpointError, match=r"step-00000003: it does not verify: manifest.json is missing.*step-00000001"
    ) as raised:
        folder.newest()
    assert "move the folder" in raised.value.advice
    assert folder.steps() == [1, 2, 3]


def test_only_set_aside_ones_left_is_refused_too(folder: CheckpointFolder) -> None:
    for step in (1, 2, 3):
        folder.set_aside(step, "for the test")
    with pytest.raises(CheckpointError, match="set aside before"):
        folder.newest()


def test_none_at_all_is_a_fresh_start(tmp_path: Path) -> None:
    assert folder_at(tmp_path / "checkpoints").newest() is None


def test_an_unusable_newest_is_set_aside_once_an_older_one_is_found(folder: CheckpointFolder) -> None:
    with pytest.raises(CheckpointError, match=r"can be used .*step-00000003: too late"):
        folder.newest(lambda state: "too late")
    assert folder.steps() == [1, 2, 3]
    assert folder.newest(lambda state: "too late" if state["batches_drawn"] > 1 else "") == folder.path(1)
    assert folder.steps() == [1]
    assert read_json(folder.folder / "broken-step-00000003-1" / "why.json")["reason"] == "too late"


def test_another_format_is_refused_not_set_aside(folder: CheckpointFolder) -> None:
    newer = Contents(4, {}, {"format": 99, "step": 4})
    folder.write(newer)
    with pytest.raises(CheckpointError, match="format 99"):
        folder.newest()
    assert 4 in folder.steps()


def test_an_evaluation_beside_a_checkpoint_breaks_nothing(folder: CheckpointFolder) -> None:
    folder.record_evaluation(2, {"val/t2i_r1": 0.5})
    verify(folder.path(2))
    assert folder.evaluation(2) == {"val/t2i_r1": 0.5}
    assert folder.evaluation(1) == {}


# Writing


def test_a_whole_one_that_is_there_stays(folder: CheckpointFolder) -> None:
    before = folder.path(2).stat().st_ino
    folder.write(contents(2))
    assert folder.path(2).stat().st_ino == before
    flip(folder.path(2))
    folder.write(contents(2))
    verify(folder.path(2))
    assert (folder.folder / "broken-step-00000002-1").is_dir()


def test_a_rename_that_could_not_be_made_durable_is_made_so_by_the_second_try(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []

    def fails_once(path: Path) -> None:
        synced.append(path)
        if len(synced) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "fsync_folder", fails_once)
    with pytest.raises(OSError, match="Input/output"):
        folder.write(contents(5))
    folder.write(contents(5))
    assert synced == [folder.folder] * 2


def test_a_stale_writer_renames_and_deletes_nothing(folder: CheckpointFolder) -> None:
    attempt_beside(folder.folder, 2)
    for act in (
        lambda: folder.write(contents(4)),
        lambda: folder.delete(1),
        lambda: folder.set_aside(1, "no"),
        lambda: folder.record_evaluation(1, {"m": 1.0}),
    ):
        with pytest.raises(StaleAttempt):
            act()
    assert sorted(path.name for path in folder.folder.iterdir()) == [
        "step-00000001",
        "step-00000002",
        "step-00000003",
    ]


def test_what_kills_left_behind_is_removed(folder: CheckpointFolder) -> None:
    (folder.folder / ".writing-step-00000004-ab12").mkdir()
    (folder.folder / ".writing-step-00000004-ab12" / "model.safetensors").write_bytes(b"half")
    (folder.folder / ".deleting-step-00000000-ab12").mkdir()
    assert folder.newest() == folder.path(3)
    folder.prepare()
    assert sorted(path.name for path in folder.folder.iterdir()) == [
        "step-00000001",
        "step-00000002",
        "step-00000003",
    ]


def save_for_ever(path: Path) -> None:
    """What a killed process was doing: saving and rotating, one step after the other."""
    folder = folder_at(path)
    saver = saver_of(folder, keep=Keep(last=2), every_steps=1)
    progress = Progress(steps_per_epoch=10, batch_size=1)
    progress.step = max(folder.steps(), default=0)
    while True:
        progress.step += 1
        progress.batches_drawn = progress.step
        saver.save(progress, {"model": Part(float(progress.step), 300_000)})


def kill_while_saving(path: Path, tries: int) -> int:
    """Kill -9 a saving process `tries` times, each at a random moment; returns the last step saved."""
    random.seed(5)
    newest = 0
    for _ in range(tries):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                save_for_ever(path)
            os._exit(1)
        time.sleep(random.uniform(0.005, 0.12))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        there = max((int(p.name[5:]) for p in path.glob("step-*")), default=0)
        folder = CheckpointFolder(attempt_beside(path), about={})
        found = folder.newest() if path.exists() else None
        if there:
            # Whatever has a checkpoint's name is whole: nothing was set aside, nothing lost.
            assert found == folder.path(there)
            part = Part()
            load_parts(found, verify(found), {"model": part})
            assert float(part.tensor[0]) == there
            assert len(folder.steps()) >= min(2, there)
        assert there >= newest
        newest = there
    assert not list(path.glob("broken-*"))
    folder_at(path)
    assert not list(path.glob(".*"))
    return newest


def test_killed_while_saving_a_whole_one_is_always_found(tmp_path: Path) -> None:
    assert kill_while_saving(tmp_path / "checkpoints", 8) > 0


@pytest.mark.long
def test_killed_while_saving_fifty_times(tmp_path: Path) -> None:
    assert kill_while_saving(tmp_path / "checkpoints", 60) > 10


# Saving in the background


class SlowFolder(CheckpointFolder):
    """A disk that takes its time: every write waits for `go`, or until it is dropped."""

    def __init__(self, path: Path) -> None:
        super().__init__(attempt_beside(path), about={})
        self.prepare()
        self.go = threading.Event()
        self.seconds = 0.0

    def write(self, contents: Contents, tell: Callable[[int], None] = lambda size: None) -> Path:
        while not self.go.wait(0.005):
            tell(0)
        time.sleep(self.seconds)
        return super().write(contents, tell)


def test_training_goes_on_while_a_thread_writes(tmp_path: Path) -> None:
    folder = SlowFolder(tmp_path / "checkpoints")
    saver = saver_of(folder, every_steps=2)
    part = Part(1.0)
    assert saver.wishes(at(0)) == Wish.NONE  # there is nothing to save before the first step
    assert saver.wishes(at(1)) == Wish.NONE
    assert saver.wishes(at(2)) == Wish.SAVE
    saver.save(at(2), {"model": part})
    part.tensor.fill_(9.0)  # the next step
    assert saver.wishes(at(2)) == Wish.NONE
    assert saver.wishes(at(3)) == Wish.NONE
    assert folder.steps() == []
    folder.go.set()
    saver.finish()
    load_parts(folder.path(2), verify(folder.path(2)), {"model": part})
    assert float(part.tensor[0]) == 1.0
    assert told(saver) == [("checkpoint", 2)]


def test_a_stop_finishes_the_write_under_way_and_saves_the_current_step(tmp_path: Path) -> None:
    folder = SlowFolder(tmp_path / "checkpoints")
    saver = saver_of(folder, every_steps=2)
    saver.save(at(2), {"model": Part()})
    threading.Timer(0.1, folder.go.set).start()
    saver.save_and_wait(at(3), {"model": Part()}, seconds_left=30.0)
    assert folder.steps() == [2, 3]
    assert saver.records.failure is None


def test_a_stop_drops_the_older_one_where_both_cannot_fit(tmp_path: Path) -> None:
    folder = SlowFolder(tmp_path / "checkpoints")
    folder.go.set()
    folder.seconds = 0.3
    saver = saver_of(folder, every_steps=2)
    saver.save(at(2), {"model": Part()})
    saver.finish()
    assert saver.last_seconds >= 0.3
    folder.go.clear()
    saver.save(at(4), {"model": Part()})
    threading.Timer(0.2, folder.go.set).start()
    saver.save_and_wait(at(5), {"model": Part()}, seconds_left=0.5)
    assert folder.steps() == [2, 5]
    assert not list(folder.folder.glob(".*"))


def test_a_stop_at_the_step_under_way_writes_it_once(tmp_path: Path) -> None:
    folder = SlowFolder(tmp_path / "checkpoints")
    saver = saver_of(folder, every_steps=2)
    saver.last_seconds = 100.0
    saver.save(at(2), {"model": Part()})
    threading.Timer(0.1, folder.go.set).start()
    saver.save_and_wait(at(2), {"model": Part()}, seconds_left=1.0)
    assert folder.steps() == [2]


def test_a_metric_that_was_not_finite_is_never_the_best(tmp_path: Path) -> None:
    folder = folder_at(tmp_path / "checkpoints")
    saver = saver_of(folder, keep=Keep(last=2, best=Best(metric="t2i_r1")), every_steps=1)
    for step, value in enumerate((0.2, math.nan, 0.1, math.nan, math.nan), start=1):
        saver.record_evaluation(step, {"t2i_r1": value})
        saver.save_and_wait(at(step), {"model": Part()})
    assert folder.steps() == [1, 4, 5]


def test_saves_come_by_the_clock(tmp_path: Path) -> None:
    saver = saver_of(folder_at(tmp_path / "checkpoints"), every_seconds=1000.0)
    assert saver.wishes(at(1)) == Wish.NONE
    saver._clock -= 1000.0
    assert saver.wishes(at(2)) == Wish.SAVE
    saver.save(at(2), {"model": Part()})
    saver.finish()
    assert saver.wishes(at(3)) == Wish.NONE


def test_by_the_clock_a_slow_disk_neither_holds_up_training_nor_is_given_two_at_once(tmp_path: Path) -> None:
    folder = SlowFolder(tmp_path / "checkpoints")
    saver = saver_of(folder, every_seconds=0.1)
    time.sleep(0.1)
    saver.save(at(1), {"model": Part()})
    time.sleep(0.15)
    assert saver.wishes(at(2)) == Wish.NONE  # due again, but the one before is still being written
    folder.go.set()
    assert saver._write
    saver._write.join()
    assert saver.wishes(at(3)) == Wish.SAVE  # the time counts from the beginning of the last save
    saver.save(at(3), {"model": Part()})
    saver.finish()
    assert saver.wishes(at(4)) == Wish.NONE
    assert folder.steps() == [1, 3]


@pytest.mark.parametrize("when", [{"every_steps": 7}, {"every_seconds": 1000.0}])
def test_what_is_kept_for_good_is_saved_whatever_the_period(tmp_path: Path, when: dict[str, Any]) -> None:
    folder = folder_at(tmp_path / "checkpoints")
    saver = saver_of(folder, keep=Keep(last=2), keep_every=10, **when)
    for step in range(1, 50):
        if saver.wishes(at(step)) & Wish.SAVE:
            saver.save(at(step), {"model": Part()})
    saver.finish()
    assert {10, 20, 30, 40} <= set(folder.steps())


def test_a_stop_keeps_the_older_one_where_the_newer_cannot_fit_either(tmp_path: Path) -> None:
    folder = SlowFolder(tmp_path / "checkpoints")
    saver = saver_of(folder, every_steps=2, last_seconds=50.0)
    saver.save(at(4), {"model": Part()})
    threading.Timer(0.1, folder.go.set).start()
    saver.save_and_wait(at(5), {"model": Part()}, seconds_left=10.0)
    assert 4 in folder.steps()


def test_the_first_save_of_an_attempt_goes_by_the_last_of_the_attempt_before(tmp_path: Path) -> None:
    folder = SlowFolder(tmp_path / "checkpoints")
    saver = saver_of(folder, every_steps=2, last_seconds=8.0)
    saver.save(at(4), {"model": Part()})
    threading.Timer(0.3, folder.go.set).start()
    saver.save_and_wait(at(5), {"model": Part()}, seconds_left=10.0)
    assert folder.steps() == [5]


@pytest.mark.parametrize(
    ("passed", "whole", "left", "dropped"),
    [
        (0.0, 10.0, 25.0, False),  # both fit
        (0.0, 10.0, 15.0, True),  # only one fits: the newer
        (6.0, 10.0, 15.0, False),  # most of the older one is done
        (6.0, 10.0, 13.0, True),
        (6.0, 10.0, 9.0, False),  # the newer does not fit: the older has the better chance
        (30.0, 10.0, 10.0, False),  # about to be done
    ],
)
def test_what_fits_into_the_time_left(passed: float, whole: float, left: float, dropped: bool) -> None:
    assert to_drop(passed, whole, left) is dropped


def test_a_first_save_under_way_at_a_stop_tells_by_its_pace_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No save of this run was ever finished: half of this one took 10 s, so one takes 20 s, both 30 s."""
    half_done, go = threading.Event(), threading.Event()

    def halting(tensors: Any) -> Iterator[Any]:
        *pieces, last = safetensors_bytes(tensors)
        yield from pieces
        yield last[:200_000]
        half_done.set()
        while not go.wait(0.005):
            yield b""
        yield last[200_000:]

    monkeypatch.setattr(checkpoint_writer, "safetensors_bytes", halting)
    saver = saver_of(folder_at(tmp_path / "checkpoints"), every_steps=2)
    saver.save(at(2), {"model": Part(size=100_000)})
    assert half_done.wait(10)
    assert saver._write
    saver._write.began -= 10.0
    threading.Timer(0.2, go.set).start()
    saver.save_and_wait(at(3), {"model": Part()}, seconds_left=25.0)
    assert steps_in(tmp_path / "checkpoints") == [3]


def test_measurements_that_a_roll_back_undid_are_not_recorded(tmp_path: Path) -> None:
    folder = folder_at(tmp_path / "checkpoints")
    saver = saver_of(folder, every_steps=2)
    saver.save(at(2), {"model": Part()})
    saver.finish()
    saver.record_evaluation(3, {"m": 1.0})
    saver.resumed_from(2)
    saver.save(at(3), {"model": Part()})
    saver.finish()
    assert folder.evaluation(3) == {}


def test_an_evaluation_that_could_not_be_written_counts_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_at(tmp_path / "checkpoints")
    saver = saver_of(folder, keep=Keep(last=2, best=Best(metric="m")), every_steps=1)
    write = folder.record_evaluation

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder, "record_evaluation", full)
    saver.record_evaluation(1, {"m": 0.9})
    saver.save_and_wait(at(1), {"model": Part()})
    monkeypatch.setattr(folder, "record_evaluation", write)
    for step in (2, 3, 4):
        saver.record_evaluation(step, {"m": 0.1})
        saver.save_and_wait(at(step), {"model": Part()})
    assert folder.steps() == [1, 3, 4]


@pytest.mark.parametrize("damage", ["unreadable", "broken", "no metrics"])
def test_one_whose_evaluation_cannot_be_read_is_not_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    folder = folder_at(tmp_path / "checkpoints")
    saver = saver_of(folder, keep=Keep(last=2, best=Best(metric="m")), every_steps=1)

    def save(step: int, value: float) -> None:
        saver.record_evaluation(step, {"m": value})
        saver.save_and_wait(at(step), {"model": Part()})

    save(1, 0.9)
    results = folder.path(1) / "evaluation.json"
    content = results.read_bytes()
    results.unlink()
    if damage == "unreadable":
        results.mkdir()  # reading it is an OSError, for root too
    else:
        results.write_text("{" if damage == "broken" else '{"metrics": []}')
    for step, value in ((2, 0.2), (3, 0.1), (4, 0.1), (5, 0.1)):
        save(step, value)
    assert folder.steps() == [1, 2, 4, 5], "the best of the others stays too"
    assert "step-00000001 is kept, because its evaluation cannot be read" in caplog.text
    if damage == "unreadable":
        results.rmdir()
    results.write_bytes(content)
    save(6, 0.1)
    assert folder.steps() == [1, 5, 6]


def test_where_pins_cannot_be_listed_nothing_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_at(tmp_path / "checkpoints")
    for step in range(1, 5):
        folder.write(contents(step))
    first = folder.path(1)
    for name in ("listdir", "scandir"):
        listing = getattr(os, name)

        def refusing(path: Any = ".", listing: Any = listing) -> Any:
            if not isinstance(path, int) and Path(path) == first:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return listing(path)

        monkeypatch.setattr(os, name, refusing)
    with reading(first), pytest.raises(PermissionError):
        folder.rotate(Keep(last=2), None, 4)
    assert folder.steps() == [1, 2, 3, 4]


def test_a_mark_that_could_not_be_written_is_written_at_the_next_save(tmp_path: Path) -> None:
    folder = folder_at(tmp_path / "checkpoints")
    saver = saver_of(folder, keep=Keep(last=2), every_steps=1)
    in_its_place = tmp_path / "evals"
    in_its_place.write_text("")  # a file where the marks' folder belongs: an OSError, for root too
    saver.owe_evaluation(1)
    for step in (1, 2, 3):
        saver.save_and_wait(at(step), {"model": Part()})
    run = Run(tmp_path)
    assert folder.steps() == [1, 2, 3], "nothing is deleted before it is marked"
    in_its_place.unlink()
    saver.save_and_wait(at(4), {"model": Part()})
    assert [owed.step for owed in owed_by(run)] == [1]
    assert folder.steps() == [1, 3, 4]


def test_a_stale_save_is_told_at_the_next_boundary(tmp_path: Path) -> None:
    saver = saver_of(folder_at(tmp_path / "checkpoints"), every_steps=1)
    attempt_beside(tmp_path / "checkpoints", 2)
    saver.save(at(1), {"model": Part()})
    saver.finish()
    assert saver.records.wishes() == Wish.ABORT
    assert isinstance(saver.records.failure, StaleAttempt)


def test_rotation_deletes_after_the_new_one_is_there(tmp_path: Path) -> None:
    folder = folder_at(tmp_path / "checkpoints")
    saver = saver_of(folder, keep=Keep(last=2), keep_every=3, every_steps=1)
    for step in range(1, 8):
        saver.save(at(step), {"model": Part()})
        saver.finish()
        assert step in folder.steps()
    assert folder.steps() == [3, 6, 7]


def test_what_somebody_reads_is_not_deleted(tmp_path: Path) -> None:
    folder = folder_at(tmp_path / "checkpoints")
    saver = saver_of(folder, keep=Keep(last=2), every_steps=1)

    def save(step: int) -> None:
        saver.save(at(step), {"model": Part()})
        saver.finish()

    save(1)
    with reading(folder.path(1)):
        for step in (2, 3, 4):
            save(step)
        assert folder.steps() == [1, 3, 4]
    save(5)
    assert folder.steps() == [4, 5]
    left = folder.path(4) / "pinned-by-one-that-died"
    left.touch()
    os.utime(left, (0, 0))
    save(6)
    save(7)
    assert folder.steps() == [6, 7]


# Parts that differ by rank


class OwnPart:
    """Every rank has another."""

    per_rank = True

    def __init__(self, value: float) -> None:
        self.tensor = torch.full((10,), value)

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensor = state["tensor"]


def brought_by(rank: int, ranks: int = 3, step: int = 4) -> Contents:
    parts = {"model": Part(1.0), "own": OwnPart(float(rank))}
    return take_copy(step, at(step).state_dict(), parts, rank=rank, ranks=ranks, number=1)


def write_together(folder: CheckpointFolder, contents: list[Contents]) -> list[BaseException | None]:
    """Every rank writes in a thread of its own, as in a process of its own; what each raised."""
    errors: list[BaseException | None] = [None] * len(contents)

    def write(place: int) -> None:
        try:
            folder.write(contents[place])
        except BaseException as error:
            errors[place] = error

    threads = [threading.Thread(target=write, args=(place,)) for place in range(len(contents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_every_rank_brings_its_part_and_rank_0_lists_them_all(folder: CheckpointFolder) -> None:
    assert write_together(folder, [brought_by(2), brought_by(0), brought_by(1)]) == [None] * 3
    whole = folder.path(4)
    state = verify(whole)
    assert set(read_manifest(whole)) == {
        "model.safetensors",
        *(f"own-rank-0000{rank}.safetensors" for rank in range(3)),
        "state.json",
    }
    assert {path.name for path in whole.iterdir()} == {*read_manifest(whole), "manifest.json"}
    for rank in range(3):
        part = OwnPart(-1.0)
        load_parts(whole, state, {"model": Part(), "own": part}, rank=rank, ranks=3)
        assert part.tensor.tolist() == [float(rank)] * 10
    assert not list(folder.folder.glob(".*"))
    with pytest.raises(CheckpointError, match=r"written by 3 ranks.*own; this run has 2 ranks"):
        load_parts(whole, state, {"model": Part(), "own": OwnPart(0.0)}, rank=0, ranks=2)
    with pytest.raises(CheckpointError, match=r"of each rank's own: own; this run has 3 ranks and none"):
        load_parts(whole, state, {"model": Part(), "own": Part()}, rank=0, ranks=3)


def test_a_rank_that_cannot_write_fails_the_save_of_all(folder: CheckpointFolder) -> None:
    failing = brought_by(1, ranks=2)
    (folder.folder / ".writing-step-00000004-1-1" / "own-rank-00001.safetensors").mkdir(parents=True)
    errors = write_together(folder, [brought_by(0, ranks=2), failing])
    assert "rank 1 could not write its files" in str(errors[0])
    assert isinstance(errors[0], OSError)
    assert isinstance(errors[1], OSError)
    assert folder.steps() == [1, 2, 3]
    assert not list(folder.folder.glob(".*"))


def test_a_rank_that_never_writes_fails_the_save(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "PEER_SECONDS", 0.1)
    with pytest.raises(OSError, match=r"rank 1 did not write its files of step 4 within 0\.1 s"):
        folder.write(brought_by(0, ranks=2))
    assert folder.steps() == [1, 2, 3]


def test_a_write_does_not_wait_for_peers_that_are_lost(folder: CheckpointFolder) -> None:
    write = _Write(folder, brought_by(0, ranks=2))
    write.start()
    time.sleep(0.1)
    assert write.is_alive()
    write.peers_lost.set()
    write.join(10)
    assert isinstance(write.error, Dropped)
    assert folder.steps() == [1, 2, 3]
    assert not list(folder.folder.glob(".*"))


def test_a_stale_write_waits_for_no_peer(folder: CheckpointFolder) -> None:
    write = _Write(folder, brought_by(0, ranks=2))
    write.start()
    time.sleep(0.1)
    assert write.is_alive()
    attempt_beside(folder.folder, 2)
    with pytest.raises(StaleAttempt):
        folder.write(brought_by(1, ranks=2))  # the peer leaves without a word
    write.join(10)
    assert isinstance(write.error, StaleAttempt)
    assert folder.steps() == [1, 2, 3]


def test_a_file_of_another_rank_that_is_damaged_breaks_the_checkpoint(folder: CheckpointFolder) -> None:
    write_together(folder, [brought_by(0, ranks=2), brought_by(1, ranks=2)])
    os.truncate(folder.path(4) / "own-rank-00001.safetensors", 20)
    with pytest.raises(Broken, match=r"own-rank-00001.safetensors has 20 bytes"):
        verify(folder.path(4))


def test_a_part_that_differs_by_rank_holds_tensors_alone() -> None:
    part = OwnPart(1.0)
    part.state_dict = lambda: {"tensor": part.tensor, "count": 3}  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=r"own differs by rank and may hold tensors alone, not count"):
        take_copy(1, {}, {"own": part}, rank=1, ranks=2)


def test_a_checkpoint_of_the_first_format_is_read(folder: CheckpointFolder) -> None:
    state = read_json(folder.path(3) / "state.json")
    assert state["format"] == 2
    older = {key: value for key, value in state.items() if key not in ("per_rank", "ranks")}
    rewrite(folder.path(3), {**older, "format": 1})
    part = Part()
    load_parts(folder.path(3), verify(folder.path(3)), {"model": part}, rank=1, ranks=4)
    assert float(part.tensor[0]) == 3.0


# Disks that are full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    path = tmp_path / "checkpoints"
    path.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root: the limit on file sizes is tested instead")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_said_retried_and_touches_no_older_one(small_disk: Path) -> None:
    folder = folder_at(small_disk)
    saver = saver_of(folder, keep=Keep(last=2), every_steps=1)
    part = Part(1.0, 150_000)
    for step in (1, 2, 3):
        saver.save(at(step), {"model": part})
        saver.finish()
    (small_disk / "ballast").write_bytes(bytes(2_500_000))
    saver.save(at(4), {"model": part})
    saver.finish()
    assert saver.wishes(at(5)) == Wish.SAVE  # at once, not at the next period
    assert folder.steps() == [2, 3]
    assert not list(folder.folder.glob(".*"))
    (small_disk / "ballast").unlink()
    saver.save(at(5), {"model": part})
    saver.finish()
    assert saver.wishes(at(5)) == Wish.NONE
    assert folder.steps() == [3, 5]
    (small_disk / "ballast").write_bytes(bytes(2_500_000))
    saver.save_and_wait(at(6), {"model": part}, seconds_left=30.0)  # both tries
    assert saver.records.wishes() == Wish.ABORT
    assert isinstance(saver.records.failure, CheckpointError)
    assert "No space left on device" in str(saver.records.failure)
    assert folder.steps() == [3, 5]
    assert [kind for kind, _ in told(saver)].count("checkpoint_failed") == 3
    assert folder.newest() == folder.path(5)


def write_beyond_a_limit(path: Path) -> int:
    """In a process whose files may have 100 kB: save twice, and tell in the exit code what happened."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    folder = folder_at(path)
    saver = saver_of(folder, keep=Keep(last=2), every_steps=1)
    saver.save(at(4), {"model": Part(1.0, 150_000)})
    saver.finish()
    once = saver.wishes(at(4)) == Wish.SAVE
    saver.save(at(5), {"model": Part(1.0, 150_000)})
    saver.finish()
    said = isinstance(saver.records.failure, CheckpointError) and os.strerror(errno.EFBIG) in str(
        saver.records.failure
    )
    return 0 if once and said and saver.records.wishes() == Wish.ABORT else 1


def test_a_write_that_the_system_refuses_ends_the_run_after_two(folder: CheckpointFolder) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            code = write_beyond_a_limit(folder.folder)
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert folder.steps() == [1, 2, 3]
    assert folder.newest() == folder.path(3)
