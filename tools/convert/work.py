"""The work of a conversion: shards are taken one by one, by any number of processes, and finished once.

While a conversion is under way, `.conversion` in the output folder holds one small file for every shard that
is done: its line of the index, its bad samples and its keys. `work` needs nothing but these, so that it goes
on wherever an earlier one was killed; `finish` writes the lists and removes them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipcluster.data.images.format import extension_of, kind_of, no_image
from clipcluster.data.shards import captions, folder_index, shard_index, shard_list
from clipcluster.data.shards.columns import BrokenColumns
from clipcluster.runs.files import write_bytes
from tools.convert.plan import DESCRIPTION, Plan, Settings, Shard, read_description
from tools.convert.records import BadRecord, Record, WholeRecord
from tools.convert.shard_writer import Behind, ShardFile, check_key, json_member

STATE = ".conversion"
BAD_SAMPLES = "bad_samples.jsonl"
_DUPLICATES = "duplicates.json"
_REPORT_SECONDS = 0.25  # whoever is told may have been asked to stop, and some samples take long
# What a sample's row of the index says, in the order it is collected.
_COLUMNS = (
    "offset",
    "image_offset",
    "image_size",
    "text_offset",
    "text_size",
    "text_kind",
    "captions",
    "class",
)

LeftOut = Mapping[str, Mapping[str, str]]


class Done(NamedTuple):
    """What is kept of a finished shard: `bad` holds (number, key, reason) of samples left out."""

    entry: shard_list.ShardEntry
    bad: list[tuple[int, str, str]]


def work(
    plan: Plan, claim: Callable[[Shard], bool], report: Callable[[int], None] = lambda samples: None
) -> None:
    """Writes unfinished shards, those for which `claim` says yes, one by one until none is left.

    Any number of processes may work on one plan: shards and their bytes do not depend on who writes them.
    `report` is told how many samples were gone through since the last time, several times a second, by this
    thread or by the one that ends shards; what it raises ends the work. What is interrupted leaves no
    shard under a final name. OSError: a disk failed, or is full.
    """
    (plan.out / STATE).mkdir(parents=True, exist_ok=True)
    behind = Behind()
    left_out = read_left_out(plan)
    split, order = -1, np.zeros(0, np.int64)
    try:
        for shard in plan.shards():
            if finished(plan, shard, left_out) is None and claim(shard):
                if shard.split != split:
                    split, order = shard.split, plan.order(shard.split)
                numbers = order[shard.start : shard.stop].tolist()
                _write(plan, shard, numbers, left_out, behind, report)
        behind.wait()
    finally:
        behind.close()


def _write(
    plan: Plan,
    shard: Shard,
    numbers: Sequence[int],
    left_out: LeftOut,
    behind: Behind,
    report: Callable[[int], None],
) -> None:
    folder = plan.folder(shard.split)
    folder.mkdir(parents=True, exist_ok=True)
    tar = ShardFile(folder / shard.name, behind)
    split, contents = plan.splits[shard.split], _Contents(tar, plan)
    skip = {int(number): key for number, key in left_out.get(_state(plan, shard).name, {}).items()}
    reported, due = 0, time.monotonic() + _REPORT_SECONDS
    try:
        for count, number in enumerate(numbers, 1):
            try:
                if number in skip:
                    raise BadRecord(skip[number], "duplicate key")
                contents.add(split.read(number))
            except BadRecord as bad:
                contents.bad.append((number, bad.key, bad.reason))
            if time.monotonic() > due:
                report(count - reported)
                reported, due = count, time.monotonic() + _REPORT_SECONDS

        def complete(entry: shard_list.ShardEntry) -> None:
            _keep(plan, shard, Done(entry, contents.bad), contents.keys)
            report(len(numbers) - reported)

        tar.close(contents.columns, complete)
    except BaseException:
        with contextlib.suppress(BaseException):  # the error on its way is the first one
            behind.wait()
        tar.discard()
        raise


class _Contents:
    """The samples of one shard: their members, rows, keys, and those that are bad."""

    def __init__(self, tar: ShardFile, plan: Plan) -> None:
        self.bad: list[tuple[int, str, str]] = []
        self.keys: dict[str, None] = {}
        self._tar = tar
        self._rows: list[int] = []
        self._settings = plan.settings

    def add(self, record: Record | WholeRecord) -> None:
        """Adds a sample. BadRecord: no image, a key that was there already or cannot be one."""
        if isinstance(record, WholeRecord):
            self._add_whole(record)
            return
        key, image, texts, fields, cls, others = record
        extension = "jpg" if image[:3] == b"\xff\xd8\xff" else _extension(key, image)
        if self._settings.resize is not None:
            image, extension = _resized(key, image, extension, self._settings)
        if "." in key or "_" in key or "\0" in key or not key or key[-1] == "/":
            _check(key, extension)
        if key in self.keys:
            raise BadRecord(key, "duplicate key")
        path = key.encode("utf-8", "surrogateescape") + b"."
        start, put = self._tar.at, self._tar.put
        if not texts and not fields and not others:
            at = put(path + extension.encode(), image)
            if cls is not None:
                put(path + b"cls", b"%d" % cls)
            self._rows.extend((start, at, len(image), 0, 0, captions.NO_TEXT, 0, -1 if cls is None else cls))
        else:
            self._add_with_text(record, path, extension, image)
        self.keys[key] = None

    def _add_with_text(self, record: Record, path: bytes, extension: str, image: bytes) -> None:
        members = _members(record, extension, image)
        found = _captions(record.members, members, record.captions)
        self._put(path, members, extension, found, -1 if record.cls is None else record.cls)

    def _add_whole(self, record: WholeRecord) -> None:
        key, written = record
        members = {name.lower(): data for name, data in written.items()}
        for name in members:
            _check(key, name)
        if key in self.keys:
            raise BadRecord(key, "duplicate key")
        extension = next((name for name in members if name in shard_index.IMAGE_EXTENSIONS), None)
        if extension is None:
            raise BadRecord(key, "no member is an image")
        number = members.get("cls", b"").strip()
        cls = int(number) if number.isdigit() and len(number) < 10 else -1
        path = key.encode("utf-8", "surrogateescape") + b"."
        self._put(path, written, extension, _captions(members, members), cls)
        self.keys[key] = None

    def _put(
        self,
        path: bytes,
        members: Mapping[str, bytes],
        extension: str,
        found: tuple[int, str | None, int],
        cls: int,
    ) -> None:
        """Writes a sample and its row; `found`: kind and name of the member with captions, their number."""
        start, at = self._tar.at, {}
        for name, data in members.items():
            offset = self._tar.put(path + name.encode("utf-8", "surrogateescape"), data)
            at[name.lower()] = offset, len(data)
        kind, text, count = found
        self._rows.extend((start, *at[extension], *(at[text] if text else (0, 0)), kind, count, cls))

    def columns(self) -> dict[str, np.ndarray]:
        """The columns of the index."""
        rows = np.array(self._rows, np.int64).reshape(-1, len(_COLUMNS))
        return {name: rows[:, column] for column, name in enumerate(_COLUMNS)}


def _extension(key: str, image: bytes) -> str:
    """The extension of an image by its content. BadRecord: it is none, or of a kind nothing here decodes."""
    extension = extension_of(image)
    if extension is None:
        raise BadRecord(key, no_image(image))
    if extension not in shard_index.IMAGE_EXTENSIONS:
        raise BadRecord(key, f"{kind_of(image)} images cannot be decoded here")
    return extension


def _resized(key: str, image: bytes, extension: str, settings: Settings) -> tuple[bytes, str]:
    from tools.convert.resize import CannotResize, resized

    side = settings.resize
    assert side is not None
    try:
        return resized(image, extension, side, mode=settings.resize_mode, quality=settings.quality)
    except CannotResize as error:
        raise BadRecord(key, str(error)) from None


def _check(key: str, extension: str) -> None:
    try:
        check_key(key, extension)
    except ValueError:
        raise BadRecord(key, "no usable key: a dot in its last part, __…__, or nothing at all") from None


def _members(record: Record, extension: str, image: bytes) -> dict[str, bytes]:
    """A sample's members by extension, in the order they are written; the reader's own come last."""
    members = {extension: image}
    try:
        if (record.captions or record.fields) and "json" not in record.members:
            members["json"] = json_member(record.captions, record.fields)
        if record.captions and "txt" not in record.members:
            members["txt"] = record.captions[0].encode()
    except UnicodeEncodeError:
        raise BadRecord(record.key, "a caption or field that is not Unicode text") from None
    except (TypeError, ValueError) as error:
        raise BadRecord(record.key, f"its fields cannot be written as JSON: {error}") from None
    if record.cls is not None:
        members["cls"] = b"%d" % record.cls
    for name in record.members:
        _check(record.key, name)
    return {**members, **record.members}


def _captions(
    foreign: Mapping[str, bytes], members: Mapping[str, bytes], texts: Sequence[str] = ()
) -> tuple[int, str | None, int]:
    """Kind and name of the member the captions come from, and their number, as a scan would find them.

    Members of `foreign` are read; the others were made of `texts`.
    """
    if "json" in members:
        if "json" in foreign:
            content = captions.parsed(captions.JSON, members["json"])
            count = len(captions.texts(captions.JSON, content, captions.DEFAULT))
        else:
            count = sum(1 for text in texts if text.strip())
        if count:
            return captions.JSON, "json", count
    if "txt" in members:
        content = captions.parsed(captions.TXT, members["txt"])
        count = len(captions.texts(captions.TXT, content, captions.DEFAULT))
        if count:
            return captions.TXT, "txt", count
    return captions.NO_TEXT, None, 0


def _state(plan: Plan, shard: Shard) -> Path:
    return plan.out / STATE / f"{shard.split}-{shard.number:05d}"


def _keep(plan: Plan, shard: Shard, done: Done, keys: Mapping[str, None]) -> None:
    """Writes down that a shard is finished; the last thing done for it."""
    state = _state(plan, shard)
    write_bytes(state.with_suffix(".keys"), "\0".join(keys).encode("utf-8", "surrogateescape"), durable=False)
    document = {"entry": asdict(done.entry), "bad": done.bad}
    write_bytes(state.with_suffix(".json"), json.dumps(document, ensure_ascii=True).encode(), durable=False)


def finished(plan: Plan, shard: Shard, left_out: LeftOut) -> Done | None:
    """What is kept of a shard, if it lies there as it was written and leaves out what it has to."""
    state = _state(plan, shard)
    try:
        document = json.loads(state.with_suffix(".json").read_bytes())
        bad = [(number, key, reason) for number, key, reason in document["bad"]]
        done = Done(shard_list.entry_of(document["entry"]), bad)
        path = plan.folder(shard.split) / shard.name
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
    shards = plan.shards()
    found = [finished(plan, shard, left_out) for shard in shards]
    done = {shard: kept for shard, kept in zip(shards, found, strict=True) if kept is not None}
    try:
        if len(done) < len(shards):
            return is_finished(plan.out)  # by another process, which has removed what was kept
        if _leave_out_duplicates(plan, done, left_out):
            return False
        for split in range(len(plan.splits)):
            _write_lists(plan, split, {shard: kept for shard, kept in done.items() if shard.split == split})
    except FileNotFoundError:
        if is_finished(plan.out):
            return True
        raise
    document = {**plan.description, "finished": True}
    write_bytes(plan.out / DESCRIPTION, (json.dumps(document, indent=1) + "\n").encode())
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
        json.dumps({"shard": shard.name, "key": key, "reason": reason, "number": number})
        for shard, kept in done.items()
        for number, key, reason in kept.bad
    ]
    if bad:
        write_bytes(folder / BAD_SAMPLES, ("\n".join(bad) + "\n").encode())
    folder_index.write_folder_index(folder, (captions.DEFAULT,), [kept.entry for kept in done.values()])


def read_bad_samples(folder: Path) -> list[int]:
    """The numbers of the samples that were left out of a split."""
    try:
        lines = (folder / BAD_SAMPLES).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [int(json.loads(line)["number"]) for line in lines]


def read_left_out(plan: Plan) -> dict[str, dict[str, str]]:
    """Samples found to repeat the key of another shard: by shard's state, sample number to key."""
    try:
        document = json.loads((plan.out / STATE / _DUPLICATES).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _leave_out_duplicates(plan: Plan, done: Mapping[Shard, Done], left_out: LeftOut) -> bool:
    """Finds keys that two shards of a split share, and has the later shard written again without them."""
    more: dict[str, dict[str, str]] = {}
    for split in range(len(plan.splits)):
        shards = [shard for shard in done if shard.split == split]
        for shard, place, key in _repeated(plan, shards):
            bad = {number for number, _, _ in done[shard].bad}
            numbers = plan.order(split)[shard.start : shard.stop].tolist()
            good = [number for number in numbers if number not in bad]
            more.setdefault(_state(plan, shard).name, {})[str(good[place])] = key
    if not more:
        return False
    every = {name: {**left_out.get(name, {}), **more.get(name, {})} for name in {*left_out, *more}}
    write_bytes(plan.out / STATE / _DUPLICATES, json.dumps(every).encode())
    return True


def _repeated(plan: Plan, shards: Sequence[Shard]) -> Iterator[tuple[Shard, int, str]]:
    """Shard, place in it and key of every sample whose key a shard before has; hashes first, then keys."""
    hashes = [np.fromiter(map(hash, _keys(plan, shard)), np.int64) for shard in shards]
    ends = np.cumsum([len(part) for part in hashes])
    every = np.concatenate(hashes)
    order = np.argsort(every, kind="stable")
    same = np.flatnonzero(every[order[1:]] == every[order[:-1]])
    first: dict[str, int] = {}
    for position in sorted({*order[same].tolist(), *order[same + 1].tolist()}):
        number = int(np.searchsorted(ends, position, side="right"))
        place = position - int(ends[number]) + len(hashes[number])
        key = _keys(plan, shards[number])[place]
        if first.setdefault(key, position) != position:
            yield shards[number], place, key


def _keys(plan: Plan, shard: Shard) -> list[str]:
    text = _state(plan, shard).with_suffix(".keys").read_bytes().decode("utf-8", "surrogateescape")
    return text.split("\0") if text else []
