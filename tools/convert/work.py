"""The work of a conversion: shards are taken one by one, by any number of processes, and finished once.

While a conversion is under way, `.conversion` in the output folder holds one small file for every shard that
is done: its line of the index, its bad samples and its keys. `work` needs nothing but these, so that it goes
on wherever an earlier one was killed; `finish` writes the lists and removes them.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipcluster.data.images.format import extension_of, kind_of, no_image
from clipcluster.data.shards import captions, folder_index, shard_index, shard_list
from clipcluster.data.shards.columns import BrokenColumns
from clipcluster.runs.files import read_object, write_bytes, write_json
from tools.convert.plan import DESCRIPTION, Plan, Settings, Shard, read_description
from tools.convert.records import BadRecord, Record, WholeRecord
from tools.convert.shard_writer import ShardFile

STATE = ".conversion"
BAD_SAMPLES = "bad_samples.jsonl"
_DUPLICATES = "duplicates.json"
_BEHIND = 4  # shards that are built and not yet complete
_NO_CAPTIONS = (0, 0, captions.NO_TEXT, 0)
_CAPTIONS_IN = captions.members_of(captions.DEFAULT)
_REPORT_SECONDS = 0.25  # whoever is told may have been asked to stop, and some samples take long
_COLUMNS = tuple(shard_index.column_types((captions.DEFAULT,)))

LeftOut = Mapping[str, Mapping[str, str]]


class Done(NamedTuple):
    """What is kept of a finished shard: `bad` holds (number, key, reason) of samples left out."""

    entry: shard_list.ShardEntry
    bad: Sequence[tuple[int, str, str]]


def work(
    plan: Plan, claim: Callable[[Shard], bool], report: Callable[[int], None] = lambda samples: None
) -> None:
    """Writes unfinished shards, those for which `claim` says yes, one by one until none is left.

    Any number of processes may work on one plan: shards and their bytes do not depend on who writes them.
    `report` is told how many samples were gone through since the last time, several times a second; what it
    raises ends the work. What is interrupted leaves no shard under a final name. OSError: a disk failed, or
    is full.
    """
    left_out = read_left_out(plan)
    ends: deque[Future[None]] = deque()  # of shards that a thread completes while the next one is built
    with ThreadPoolExecutor(1, "shard-writer") as thread:
        for shard in plan.shards:
            if finished(plan, shard, left_out) is None and claim(shard):
                ends.append(_write(plan, shard, left_out, thread, report))
            while ends and (ends[0].done() or len(ends) > _BEHIND):
                ends.popleft().result()
        for end in ends:
            end.result()


def _write(
    plan: Plan, shard: Shard, left_out: LeftOut, thread: Executor, report: Callable[[int], None]
) -> Future[None]:
    """Builds a shard; the thread completes it."""
    folder = plan.folder(shard.split)
    for needed in (folder, plan.out / STATE):
        needed.mkdir(parents=True, exist_ok=True)
    tar = ShardFile(folder / shard.name)
    split, contents = plan.splits[shard.split], _Contents(tar, plan.settings)
    skip = left_out.get(_state(plan, shard).name, {})
    reported, due = 0, time.monotonic() + _REPORT_SECONDS
    try:
        for count, number in enumerate(plan.numbers(shard), 1):
            try:
                if skip and str(number) in skip:
                    raise BadRecord(skip[str(number)], "duplicate key")
                contents.add(split.read(number))
            except BadRecord as bad:
                contents.bad.append((number, bad.key, bad.reason))
            if time.monotonic() > due:
                report(count - reported)
                reported, due = count, time.monotonic() + _REPORT_SECONDS
    except BaseException:
        tar.discard()
        raise
    end = thread.submit(_complete, plan, shard, tar, contents)
    report(shard.stop - shard.start - reported)
    return end


def _complete(plan: Plan, shard: Shard, tar: ShardFile, contents: _Contents) -> None:
    """Gives a shard its name, then writes down that it is finished."""
    done = {"entry": asdict(tar.finish(contents.columns())), "bad": contents.bad}
    keys = "\0".join(contents.keys).encode("utf-8", "surrogateescape")
    state = _state(plan, shard)
    write_bytes(state.with_suffix(".keys"), keys, durable=False)
    write_bytes(state.with_suffix(".json"), json.dumps(done).encode(), durable=False)


class _Contents:
    """The samples of one shard: their members, rows, keys, and those that are bad."""

    def __init__(self, tar: ShardFile, settings: Settings) -> None:
        self.bad: list[tuple[int, str, str]] = []
        self.keys: dict[str, None] = {}
        self._tar = tar
        self._rows: list[int] = []
        self._settings = settings

    def add(self, record: Record | WholeRecord) -> None:
        """Adds a sample. BadRecord: no image, a key that was there already or cannot be one."""
        key, known = record.key, None
        if isinstance(record, WholeRecord):
            extension, image = _image_among(record)
            members, cls = record.members, None
        else:
            extension, image = _image_of(record, self._settings)
            members, cls = _members(record, extension, image), record.cls
            if "json" not in record.members:
                known = len([text for text in record.captions if text.strip()])
        if "." in key or "_" in key or "\0" in key or not key or key[-1] == "/":
            _check(key, extension)
        if key in self.keys:
            raise BadRecord(key, "duplicate key")
        path, start, put = key.encode("utf-8", "surrogateescape") + b".", self._tar.at, self._tar.put
        if members:
            at = {
                name.lower(): (put(path + name.encode("utf-8", "surrogateescape"), data), data)
                for name, data in members.items()
            }
            row = at[extension][0], len(at[extension][1]), _class(at), *_captions(at, known)
        else:
            at_image = put(path + extension.encode(), image)
            row = at_image, len(image), -1 if cls is None else cls, *_NO_CAPTIONS
            if cls is not None:
                put(path + b"cls", b"%d" % cls)
        self._rows.extend((start, *row))
        self.keys[key] = None

    def columns(self) -> dict[str, np.ndarray]:
        """The columns of the index."""
        rows = np.array(self._rows, np.int64).reshape(-1, len(_COLUMNS))
        return {name: rows[:, column] for column, name in enumerate(_COLUMNS)}


def _class(at: Mapping[str, tuple[int, bytes]]) -> int:
    """The decimal number in `cls`, or -1."""
    number = at["cls"][1].strip() if "cls" in at else b""
    return int(number) if number.isdigit() and len(number) < 10 else -1


def _image_among(record: WholeRecord) -> tuple[str, bytes]:
    """Extension and bytes of the image among the members. BadRecord: there is none."""
    for name, data in record.members.items():
        if name.lower() in shard_index.IMAGE_EXTENSIONS:
            return name.lower(), data
    raise BadRecord(record.key, "no member is an image")


def _image_of(record: Record, settings: Settings) -> tuple[str, bytes]:
    """Extension, by its content, and bytes of the image. BadRecord: there is none."""
    key, image = record.key, record.image
    extension = extension_of(image)
    if extension is None:
        raise BadRecord(key, no_image(image))
    if extension not in shard_index.IMAGE_EXTENSIONS:
        raise BadRecord(key, f"{kind_of(image)} images cannot be decoded here")
    if settings.resize is not None:
        from tools.convert.resize import resized

        try:
            image, extension = resized(
                image, extension, settings.resize, mode=settings.resize_mode, quality=settings.quality
            )
        except ValueError as error:
            raise BadRecord(key, str(error)) from None
    return extension, image


def _members(record: Record, extension: str, image: bytes) -> dict[str, bytes]:
    """A sample's members by extension, in the order they are written; the reader's own come last.

    Empty where the image and the class are all there is: such samples are quick to write.
    """
    if not record.captions and not record.fields and not record.members:
        return {}
    for name in record.members:
        _check(record.key, name)
    members = {extension: image}
    try:
        if (record.captions or record.fields) and "json" not in record.members:
            content = {"captions": list(record.captions), **record.fields}
            members["json"] = json.dumps(content, ensure_ascii=False).encode()
        if record.captions and "txt" not in record.members:
            members["txt"] = record.captions[0].encode()
    except UnicodeEncodeError:
        raise BadRecord(record.key, "a caption or field that is not Unicode text") from None
    except (TypeError, ValueError) as error:
        raise BadRecord(record.key, f"its fields cannot be written as JSON: {error}") from None
    if record.cls is not None:
        members["cls"] = b"%d" % record.cls
    return {**members, **record.members}


def _check(key: str, extension: str) -> None:
    """BadRecord for a key that readers of the tar could not tell from the extension again."""
    if "\0" in key or shard_index.sample_name(f"{key}.{extension}") != (key, extension):
        raise BadRecord(key, "no usable key: a dot in its last part, __…__, or nothing at all")


def _captions(at: Mapping[str, tuple[int, bytes]], known: int | None) -> tuple[int, int, int, int]:
    """Offset and size of the member the captions come from, its kind and their number, as a scan finds them.

    `at`: offset and bytes of the members; `known`: the captions in the json where it need not be read.
    """
    for kind, name in _CAPTIONS_IN:
        if name in at:
            offset, data = at[name]
            if kind == captions.JSON and known is not None:
                count = known
            else:
                count = len(captions.texts(kind, captions.parsed(kind, data), captions.DEFAULT))
            if count:
                return offset, len(data), kind, count
    return _NO_CAPTIONS


def _state(plan: Plan, shard: Shard) -> Path:
    return plan.out / STATE / f"{shard.split}-{shard.number:05d}"


def finished(plan: Plan, shard: Shard, left_out: LeftOut) -> Done | None:
    """What is kept of a shard, if it lies there as it was written and leaves out what it has to."""
    state = _state(plan, shard)
    path = plan.folder(shard.split) / shard.name
    try:
        document = json.loads(state.with_suffix(".json").read_bytes())
        done = Done(shard_list.entry_of(document["entry"]), document["bad"])
        found = path.stat()
        rows = shard_index.read_shard_index(shard_index.shard_index_path(path.parent, path.name))
    except (OSError, ValueError, KeyError, TypeError, BrokenColumns):
        return None
    same = (found.st_size, found.st_mtime_ns) == (done.entry.bytes, done.entry.mtime_ns)
    if not same or rows.meta["sha256"] != done.entry.sha256:
        return None
    return done if set(left_out.get(state.name, {})) <= {str(number) for number, _, _ in done.bad} else None


def finish(plan: Plan) -> bool:
    """Writes the lists of a conversion whose shards are all there, once `work` has returned.

    False: shards are missing, or were found to repeat a key of another shard and have to be written again
    without it; `work` and `finish` again. Several processes may call it, one after the other or at once.
    """
    left_out = read_left_out(plan)
    found = {shard: finished(plan, shard, left_out) for shard in plan.shards}
    done = {shard: kept for shard, kept in found.items() if kept is not None}
    try:
        if len(done) < len(found):
            return is_finished(plan.out)  # by another process, which has removed what was kept
        if _leave_out_duplicates(plan, done, left_out):
            return False
        for split in range(len(plan.splits)):
            _write_lists(plan, split, {shard: kept for shard, kept in done.items() if shard.split == split})
        write_json(plan.out / DESCRIPTION, {**plan.description, "finished": True})
    except FileNotFoundError:
        if is_finished(plan.out):
            return True
        raise
    shutil.rmtree(plan.out / STATE, ignore_errors=True)
    return True


def is_finished(out: Path) -> bool:
    """Whether the lists are written; what is kept of the shards is removed after that."""
    return bool((read_description(out) or {}).get("finished"))


def _write_lists(plan: Plan, split: int, done: Mapping[Shard, Done]) -> None:
    folder = plan.folder(split)
    for name, text in plan.splits[split].files.items():
        write_bytes(folder / name, text.encode())
    bad = [
        json.dumps({"shard": shard.name, "key": key, "reason": reason, "number": number}) + "\n"
        for shard, kept in done.items()
        for number, key, reason in kept.bad
    ]
    if bad:
        write_bytes(folder / BAD_SAMPLES, "".join(bad).encode())
    folder_index.write_folder_index(folder, (captions.DEFAULT,), [kept.entry for kept in done.values()])


def read_left_out(plan: Plan) -> LeftOut:
    """Samples found to repeat the key of another shard: by shard's state, sample number to key."""
    return read_object(plan.out / STATE / _DUPLICATES) or {}


def _leave_out_duplicates(plan: Plan, done: Mapping[Shard, Done], left_out: LeftOut) -> bool:
    """Finds keys that two shards of a split share, and has the later shard written again without them."""
    every = {name: dict(samples) for name, samples in left_out.items()}
    for split in range(len(plan.splits)):
        for shard, place, key in _repeated(plan, [shard for shard in done if shard.split == split]):
            bad = {number for number, _, _ in done[shard].bad}
            good = [number for number in plan.numbers(shard) if number not in bad]
            every.setdefault(_state(plan, shard).name, {})[str(good[place])] = key
    if every == left_out:
        return False
    write_json(plan.out / STATE / _DUPLICATES, every)
    return True


def _repeated(plan: Plan, shards: Sequence[Shard]) -> Iterator[tuple[Shard, int, str]]:
    """Shard, place in it and key of every sample whose key a shard before has; hashes first, then keys."""
    hashes = [np.fromiter(map(hash, _keys(plan, shard)), np.int64) for shard in shards]
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    repeated, seen = values[counts > 1], set[str]()
    for shard, own in zip(shards, hashes, strict=True):
        places = np.flatnonzero(np.isin(own, repeated)).tolist() if len(repeated) else []
        keys = _keys(plan, shard) if places else []
        for place in places:
            if keys[place] in seen:
                yield shard, place, keys[place]
            seen.add(keys[place])


def _keys(plan: Plan, shard: Shard) -> list[str]:
    text = _state(plan, shard).with_suffix(".keys").read_bytes().decode("utf-8", "surrogateescape")
    return text.split("\0") if text else []
