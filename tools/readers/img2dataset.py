"""img2dataset's downloads and DataComp's pools: NAME.tar (or NAME/), NAME.parquet, NAME_stats.json."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.errors import UserError
from tools import uids
from tools.records import BadRecord, InputFile, Kind, Record, Source, option
from tools.tar_samples import TarSamples, image_of

_NO_LABEL = bytes(uids.NBYTES)


@dataclass(frozen=True)
class Options:
    uids: str = option(
        "",
        "Take only these uids (DataComp's .npy, the same as raw bytes, or text); repeats repeat.",
        metavar="FILE",
    )
    caption: str = option(
        "", "Take the captions from this field of the json (default: txt, else json).", metavar="FIELD"
    )
    once: str = option(
        "", "Of samples with an equal value of this field of the json take the first.", metavar="FIELD"
    )


class Downloads:
    """The samples of a folder of downloads, as one split."""

    name = ""
    files: Mapping[str, str] = {}

    def __init__(self, samples: TarSamples, chosen: Chosen, caption: str) -> None:
        self._samples, self._chosen, self._caption = samples, chosen, caption

    def __len__(self) -> int:
        return len(self._chosen.numbers)

    def sizes(self) -> np.ndarray:
        return self._samples.image_bytes[self._chosen.numbers]

    def read(self, number: int) -> Record:
        key, members = self._samples.read(int(self._chosen.numbers[number]))
        record = record_of(key, members, self._caption)
        if self._chosen.by_uid:
            key = uids.from_hex(record.fields["uid"]).hex()  # type: ignore[union-attr]
        repeat = None if self._chosen.repeats is None else int(self._chosen.repeats[number])
        if self._chosen.by_uid or repeat:
            key = f"{key}{self._chosen.dash}{repeat}"
        return record._replace(key=key)


@dataclass
class Chosen:
    """Which samples are taken: their `numbers`, and how often each key came before (None: never)."""

    numbers: np.ndarray
    repeats: np.ndarray | None = None
    by_uid: bool = False
    dash: str = "-"


def record_of(key: str, members: dict[str, bytes], caption: str = "") -> Record:
    """A sample of image, txt, json and cls; other members stay members. BadRecord if one cannot be read.

    Captions are the json's field `caption` if one is named; else its `captions` if that is a list, else txt,
    else what the json says under `caption`.
    """
    rest = dict(members)
    extension = image_of(members)
    if extension is None:
        raise BadRecord(key, "no image")
    image = rest.pop(extension)
    fields = _fields(key, rest.pop("json", b"{}"))
    texts = _captions(key, fields, rest.pop("txt", b""), caption)
    cls = rest.pop("cls", b"").strip()
    return Record(
        key,
        image,
        texts,
        {name: value for name, value in fields.items() if name != "captions"},
        int(cls) if cls.isdigit() else None,
        rest,
    )


def _fields(key: str, data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise BadRecord(key, "its json cannot be read") from None
    if not isinstance(fields, dict):
        raise BadRecord(key, "its json is no mapping")
    return fields


def _captions(key: str, fields: dict[str, Any], txt: bytes, caption: str) -> list[str]:
    value = fields.get(caption or "captions")
    if not caption and not isinstance(value, list):
        try:
            value = txt.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRecord(key, "its txt is not UTF-8") from None
        value = value if value.strip() else fields.get("caption")
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]


def open_downloads(inputs: Sequence[Path], options: Options) -> Source:
    """Opens folders of downloads as one split. UserError: none there, a broken uid file, no sample left."""
    paths = [path for folder in inputs for path in find_parts(folder)]
    if options.uids and options.once:
        raise UserError("--uids takes each uid once already, or as often as its file says; leave --once away")
    label = _uid_label if options.uids else partial(_field_label, options.once) if options.once else None
    samples = TarSamples(paths, label=label)
    notes = [*samples.broken, *failures(paths, samples)]
    if samples.without_image:
        notes.append(f"{samples.without_image:,} samples without an image are left out")
    if options.uids:
        chosen, more = _by_uids(samples, Path(options.uids))
    else:
        chosen, more = _all_or_once(samples, options.once)
    if len(chosen.numbers) == 0:
        raise UserError(f"{', '.join(map(str, inputs))}: no sample is left; " + "; ".join([*notes, *more]))
    samples.forget()
    files = [input_of(path) for path in paths]
    files += [InputFile.of(Path(options.uids))] if options.uids else []
    return Source([Downloads(samples, chosen, options.caption)], files, [*notes, *more])


def find_parts(folder: Path) -> list[Path]:
    """The tars of a folder by name, or the folders NAME of img2dataset's output of files."""
    if folder.is_file() and folder.suffix == ".tar":
        return [folder]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of img2dataset's NAME.tar and NAME.parquet")
    found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    tars = [path for path in found if path.name.endswith(".tar")]
    if tars:
        return tars
    beside = {path.name for path in found}
    folders = [path for path in found if path.is_dir() and f"{path.name}_stats.json" in beside]
    if folders:
        return folders
    if any(path.suffix == ".parquet" for path in found):
        raise UserError(
            f"{folder}: parquet files without tars beside them; if the images are in them: "
            f"clipcluster shards convert parquet {folder}"
        )
    below = [path.name for path in found if path.is_dir() and next(path.glob("*.tar"), None) is not None]
    if below:
        raise UserError(f"{folder}: the tars lie in its folders {', '.join(below[:5])}; give these folders")
    raise UserError(
        f"{folder}: neither NAME.tar nor folders NAME with NAME_stats.json, as img2dataset makes them"
    )


def input_of(path: Path) -> InputFile:
    """The state of a shard; of a folder of files the state of all of them."""
    if not path.is_dir():
        return InputFile.of(path)
    with os.scandir(path) as entries:
        states = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)
    digest = hashlib.sha256(json.dumps(states).encode()).hexdigest()
    return InputFile(str(path), sum(s[1] for s in states), max((s[2] for s in states), default=0), digest)


def failures(paths: Sequence[Path], samples: TarSamples) -> list[str]:
    """What failed by the parquets beside the shards, and where they contradict these; a line each."""
    tables = {path: path.with_name(f"{path.name.removesuffix('.tar')}.parquet") for path in paths}
    there = {path: table for path, table in tables.items() if table.is_file()}
    if not there:
        return []
    notes = []
    if len(there) < len(paths):
        missing = next(table for path, table in tables.items() if path not in there)
        notes.append(
            f"{missing} is not there ({len(paths) - len(there)} of {len(paths)} shards have none): "
            "that download may be unfinished"
        )
    try:
        from pyarrow import parquet
    except ImportError:
        return [
            *notes,
            "what failed to download was not counted; that needs: pip install 'clipcluster[parquet]'",
        ]
    counts: Counter[str] = Counter()
    held = np.bincount(samples.shards, minlength=len(paths))
    for number, path in enumerate(paths):
        if path not in there or "status" not in parquet.read_schema(there[path]).names:
            continue
        status = Counter(parquet.read_table(there[path], columns=["status"]).column(0).to_pylist())
        counts += status
        if status["success"] != held[number]:
            notes.append(f"{path}: {held[number]:,} samples, but its parquet says {status['success']:,}")
    failed = {name or "without status": count for name, count in counts.items() if name != "success"}
    if failed:
        reasons = ", ".join(f"{count:,} {name}" for name, count in sorted(failed.items()))
        notes.append(f"{sum(failed.values()):,} of {sum(counts.values()):,} downloads failed: {reasons}")
    return notes


def uid_of(key: str, read_json: Any) -> bytes | None:
    """The uid of a sample: the json's, else the key (without the `-j` of a repeat) if it is one."""
    if read_json is not None:
        try:
            fields = json.loads(read_json())
        except (ValueError, RecursionError):
            fields = None
        if isinstance(fields, dict) and "uid" in fields:
            return uids.from_hex(fields["uid"])
    name = key.rpartition("/")[2]
    return uids.from_hex(name[:32]) if len(name) == 32 or name[32:33] == "-" else None


def _uid_label(key: str, read_json: Any) -> bytes:
    return uid_of(key, read_json) or _NO_LABEL


def _field_label(field: str, key: str, read_json: Any) -> bytes:
    """A hash of a field of the json, or zeros."""
    try:
        value = json.loads(read_json())[field] if read_json is not None else None
    except (ValueError, LookupError, TypeError, RecursionError):
        value = None
    if value is None:
        return _NO_LABEL
    text = json.dumps(value, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=uids.NBYTES).digest()


def labels_of(samples: TarSamples) -> np.ndarray:
    """The first 16 bytes of every label, (n,) S16."""
    if samples.labels is None or len(samples) == 0:
        return np.zeros(0, f"S{uids.NBYTES}")
    return np.ascontiguousarray(samples.labels[:, : uids.NBYTES]).view(f"S{uids.NBYTES}").ravel()


def _by_uids(samples: TarSamples, file: Path) -> tuple[Chosen, list[str]]:
    """The samples of the file's uids, each as often as it stands there, in the order of the shards."""
    wanted, times = np.unique(uids.read_uids(file), return_counts=True)
    labels = labels_of(samples)
    first = _first_of_each(labels)
    at = np.searchsorted(wanted, labels)
    found = at < len(wanted)
    found[found] = wanted[at[found]] == labels[found]
    found &= labels != _NO_LABEL
    numbers = np.flatnonzero(found & first)
    counts = times[at[numbers]]
    ends = np.cumsum(counts)
    repeats = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    notes = [
        f"{len(numbers):,} of the {len(wanted):,} uids of {file} are there, "
        f"{len(repeats):,} samples with repeats"
    ]
    again = int((found & ~first).sum())
    if again:
        notes.append(f"{again:,} samples have a uid that came before, and are left out")
    without = int((labels == _NO_LABEL).sum())
    if without:
        notes.append(f"{without:,} samples without a uid are left out")
    return Chosen(np.repeat(numbers, counts), repeats, by_uid=True), notes


def _all_or_once(samples: TarSamples, once: str) -> tuple[Chosen, list[str]]:
    """All samples, or the first of those with one label; a key that comes again gets a number."""
    numbers, notes = np.arange(len(samples)), []
    if once:
        labels = labels_of(samples)
        taken = _first_of_each(labels) | (labels == _NO_LABEL)
        numbers = np.flatnonzero(taken)
        notes.append(f"{len(taken) - len(numbers):,} samples with a {once} that came before are left out")
        without = int((labels == _NO_LABEL).sum())
        notes += [f"{without:,} samples without {once} are all taken"] if without else []
    keys = samples.keys[numbers]
    repeats = _repeats(keys)
    if not repeats.any():
        return Chosen(numbers), notes
    again = repeats > 0
    dash = _dash(keys, keys[again], repeats[again])
    notes.append(
        f"{int(again.sum()):,} samples have a key that came before, and are named KEY{dash}1 and so on"
    )
    return Chosen(numbers, repeats, dash=dash), notes


def _dash(keys: np.ndarray, again: np.ndarray, repeats: np.ndarray) -> str:
    """What parts a key that came before from its number, so that no such name is another sample's key."""
    dash = "-"
    while np.isin(
        [b"%s%s%d" % (k, dash.encode(), j) for k, j in zip(again, repeats, strict=True)], keys
    ).any():
        dash += "-"
    return dash


def _repeats(values: np.ndarray) -> np.ndarray:
    """How often each value came before, (n,) int64."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    begins = np.ones(len(values), bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    starts = np.maximum.accumulate(np.where(begins, np.arange(len(values)), 0))
    repeats = np.empty(len(values), np.int64)
    repeats[order] = np.arange(len(values)) - starts
    return repeats


def _first_of_each(values: np.ndarray) -> np.ndarray:
    """Whether a value comes here for the first time, (n,) bool."""
    first = np.zeros(len(values), bool)
    first[np.unique(values, return_index=True)[1]] = True
    return first


KIND = Kind(
    "img2dataset's downloads and DataComp's pools, all of them or the samples of a list of uids",
    open_downloads,
    inputs="Folders of NAME.tar (or NAME/), NAME.parquet and NAME_stats.json.",
    options=Options,
)
