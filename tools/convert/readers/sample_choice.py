"""Which samples of some shards are taken, and under which key: all, a list of uids, one of equal ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tools.convert.readers import uids
from tools.convert.readers.sample_members import record_of, uid_of
from tools.convert.readers.tar_samples import TarSamples
from tools.convert.records import Record


@dataclass
class Chosen:
    """Which samples are taken: their `numbers`, and how often each key came before (None: never)."""

    numbers: np.ndarray
    repeats: np.ndarray | None = None
    by_uid: bool = False
    dash: str = "-"

    def key(self, position: int, key: str, members: Mapping[str, bytes]) -> str:
        """The key of the sample at a position, whose own is `key`."""
        if self.repeats is None:
            return key
        repeat = int(self.repeats[position])
        uid = uid_of(key, partial(members.__getitem__, "json") if "json" in members else None)
        if self.by_uid and uid is not None:
            return f"{uid.hex()}-{repeat}"
        return f"{key}{self.dash}{repeat}" if repeat else key


class ChosenSplit:
    """The samples taken of some shards, as one split; `caption_field` as `record_of` has it."""

    def __init__(
        self,
        samples: TarSamples,
        chosen: Chosen,
        caption_field: str | None,
        name: str = "",
        files: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.files = name, files or {}
        self._samples, self._chosen, self._caption_field = samples, chosen, caption_field

    def __len__(self) -> int:
        return len(self._chosen.numbers)

    def sizes(self) -> np.ndarray:
        return self._samples.image_bytes[self._chosen.numbers]

    def read(self, number: int) -> Record:
        key, members = self._samples.read(int(self._chosen.numbers[number]))
        return record_of(self._chosen.key(number, key, members), members, self._caption_field)


def uid_label(key: str, read_json: Any) -> bytes:
    """The uid, then whether there is one."""
    return _label(uid_of(key, read_json))


def field_label(field: str, key: str, read_json: Any) -> bytes:
    """A hash of a field of the json, then whether there is one."""
    try:
        value = json.loads(read_json())[field] if read_json is not None else None
    except (ValueError, LookupError, TypeError, RecursionError):
        value = None
    if value is None:
        return _label(None)
    text = json.dumps(value, sort_keys=True).encode()
    return _label(hashlib.blake2b(text, digest_size=uids.NBYTES).digest())


def _label(value: bytes | None) -> bytes:
    return bytes(uids.NBYTES + 1) if value is None else value + b"\1"


def labels_of(samples: TarSamples) -> tuple[np.ndarray, np.ndarray]:
    """What every label says, (n,) S16, and whether it says anything, (n,) bool."""
    if samples.labels is None or len(samples) == 0:
        return np.zeros(0, f"S{uids.NBYTES}"), np.zeros(0, bool)
    values = np.ascontiguousarray(samples.labels[:, : uids.NBYTES]).view(f"S{uids.NBYTES}").ravel()
    return values, samples.labels[:, uids.NBYTES] == 1


def by_uids(samples: TarSamples, file: Path) -> tuple[Chosen, list[str]]:
    """The samples of the file's uids, each as often as it stands there, in the order of the shards."""
    wanted, times = np.unique(uids.read_uids(file), return_counts=True)
    labels, known = labels_of(samples)
    first = np.zeros(len(labels), bool)
    first[known] = first_of_each(labels[known])
    at = np.searchsorted(wanted, labels)
    found = at < len(wanted)
    found[found] = wanted[at[found]] == labels[found]
    found &= known
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
    without = int((~known).sum())
    if without:
        notes.append(f"{without:,} samples without a uid are left out")
    return Chosen(np.repeat(numbers, counts), repeats, by_uid=True), notes


def all_or_once(samples: TarSamples, once: str | None) -> tuple[Chosen, list[str]]:
    """All samples, or the first of those with one label; a key that comes again gets a number."""
    numbers, notes = np.arange(len(samples)), []
    if once:
        labels, known = labels_of(samples)
        taken = ~known
        taken[known] = first_of_each(labels[known])
        numbers = np.flatnonzero(taken)
        notes.append(f"{len(taken) - len(numbers):,} samples with a {once} that came before are left out")
        without = int((~known).sum())
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


def first_of_each(values: np.ndarray) -> np.ndarray:
    """Whether a value comes here for the first time, (n,) bool."""
    first = np.zeros(len(values), bool)
    first[np.unique(values, return_index=True)[1]] = True
    return first
