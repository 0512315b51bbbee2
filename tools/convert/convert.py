"""`clipcluster shards convert KIND [INPUT …] --out DIR`: data of many kinds into indexed shards."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipcluster.data.shards.shard_list import IndexSummary, read_summary
from clipcluster.errors import UserError
from clipcluster.runs.files import read_lines, write_json
from tools.convert import plan as planning
from tools.convert import pool as processes
from tools.convert import work as making
from tools.convert.plan import Plan, Settings
from tools.convert.records import Kind

# Modules of tools.convert.readers by the name of what they read; imported when asked for.
KINDS = {
    "digits": "digits",
    "folder": "folder",
    "coco": "coco",
    "csv": "table",
    "chinese-clip": "chinese_clip",
    "lmdb": "lmdb",
    "parquet": "parquet",
    "img2dataset": "img2dataset",
    "datacompdr": "datacompdr",
    "shards": "shards",
    "webdataset": "webdataset",
}
_LOCK_PATIENCE = 10.0  # seconds: the workers of a killed conversion leave within them


@dataclass(frozen=True)
class Conversion:
    """`made` is False if the folder was there already, finished, and nothing was done.

    `bad` counts the samples left out of each split; `bad_samples.jsonl` in its folder lists them. `accounts`
    say, for kinds that tell and splits just made, where what was read went: (name, count), in order.
    """

    out: Path
    made: bool
    splits: dict[str, IndexSummary]
    bad: dict[str, int]
    notes: Sequence[str]
    accounts: dict[str, list[tuple[str, int]]]


def kind_named(name: str) -> Kind:
    """The reader of a kind. UserError: there is no such kind."""
    if name not in KINDS:
        raise UserError(f"convert {name!r}: no such kind of input; there are: {', '.join(sorted(KINDS))}")
    kind: Kind = importlib.import_module(f"tools.convert.readers.{KINDS[name]}").KIND
    return kind


def prepare(
    kind: str, out: Path, inputs: Sequence[Path], options: Any = None, settings: Settings | None = None
) -> Plan:
    """Opens the inputs and cuts them into shards; writes nothing.

    UserError as `convert`, but for what writing meets.
    """
    chosen = kind_named(kind)
    _refuse_places(out, inputs, chosen)
    was = planning.read_description(out)
    # a conversion may have been killed before it wrote what it is
    if was is None and out.exists() and not {*os.listdir(out)} <= {making.STATE}:
        raise UserError(f"{out} exists and is not a conversion; choose another --out, or remove it first")
    settings = settings or Settings()
    if settings.samples_per_shard is None and settings.bytes_per_shard is None:
        settings = replace(settings, samples_per_shard=chosen.samples_per_shard)
    for name in ("resize_mode", "quality"):
        value = getattr(settings, name)
        if settings.resize is None and value != getattr(Settings, name):
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option} {value}: it goes with --resize SIDE; without that no image is re-encoded"
            )
    options = chosen.options() if options is None else options
    finished = bool(was and was.get("finished"))
    if was is not None and finished and not all(path.exists() for path in inputs):
        # its input may go once it is converted; all else must still be the same
        plan = Plan(out, {**was, **planning.describe(kind, inputs, options, settings)}, settings, finished)
    else:
        source = chosen.open(inputs, options)
        plan = replace(planning.plan(out, kind, inputs, options, settings, source), finished=finished)
    if was is not None:
        planning.refuse_differences(out, was, plan.description)
    return plan


@contextlib.contextmanager
def begun(plan: Plan) -> Iterator[None]:
    """Keeps others away, removes what a killed conversion left aside, writes down what is converted.

    UserError: another conversion is writing there, or what the file system refuses within the block.
    """
    with told_to_people(plan):
        try:
            plan.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            wrong = f"the folder cannot be created ({error.strerror}); choose another place"
            raise UserError(f"--out {plan.out}: {wrong}") from None
        with _alone(plan.out):
            sweep(plan)
            (plan.out / making.STATE).mkdir(exist_ok=True)
            write_json(plan.out / planning.DESCRIPTION, {**plan.description, "finished": False})
            yield


def convert(
    kind: str,
    out: Path,
    inputs: Sequence[Path] = (),
    options: Any = None,
    settings: Settings | None = None,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Converts inputs into the shards of `out`, going on where an earlier call stopped.

    A finished conversion is left as it is. `options` are the kind's own (`Kind.options`). `progress(done,
    total)` is told the samples. UserError: an unknown kind, inputs that are not what they should be, an
    output folder that holds something else or another conversion, a full disk.
    """
    plan = prepare(kind, out, inputs, options, settings)
    if plan.finished:
        return _result(plan)
    with begun(plan):
        try:
            while True:
                processes.run(plan, workers, progress)
                if making.finish(plan):
                    return _result(plan)
        finally:
            sweep(plan)


def _refuse_places(out: Path, inputs: Sequence[Path], kind: Kind) -> None:
    """UserError: an output that is a file or would be input at the next call."""
    there = next((place for place in (out, *out.parents) if place.exists()), None)
    if there is not None and not there.is_dir():
        raise UserError(f"--out {out}: {there} is a file; give a folder to make")
    for path in inputs if kind.takes_all_below else ():
        if path.is_dir() and path.resolve() in out.resolve().parents:
            raise UserError(
                f"--out {out}: it lies in {path}, and all that is below belongs to the input; give a folder "
                "outside it"
            )


def sweep(plan: Plan) -> None:
    """Removes what a killed conversion left aside."""
    for folder in {plan.out, plan.out / making.STATE, *map(plan.folder, range(len(plan.splits)))}:
        for path in folder.glob(".*.part"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keeps a second conversion away from `out`. UserError: there is one."""
    fd = os.open(out, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"{out}: another conversion is writing into it; wait for it") from None
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks: two conversions write the same bytes
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def told_to_people(plan: Plan) -> Iterator[None]:
    """What the file system refuses becomes one message; the same command goes on afterwards."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise UserError(
            f"{error.filename or plan.out}: {'no space left to write to: ' if full else ''}"
            f"{error.strerror or error}; the shards made so far are kept, and the same command continues"
        ) from None


def _result(plan: Plan) -> Conversion:
    """The splits of a finished conversion; UserError if a shard is not what the index says."""
    done = Conversion(plan.out, not plan.finished, {}, {}, plan.notes, {})
    for number, split in enumerate(plan.description["splits"]):
        folder, name = plan.out / split["name"], split["name"] or "."
        summary = done.splits[name] = read_summary(folder)
        done.bad[name] = split["samples"] - summary.samples
        if plan.finished:
            from clipcluster.data.shards.open import open_folder  # needs much that a conversion does not

            open_folder(folder).check_unchanged()
        elif account := plan.splits[number].account:
            bad = [line["number"] for line in read_lines(folder / making.BAD_SAMPLES)]
            done.accounts[name] = account(bad, summary.captions)
    return done
