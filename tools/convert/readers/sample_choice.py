"""Which samples of some shards are taken, and under which key: all, a list of uids, one of equal ones.

A uid of DataComp's has 128 bits, written as 32 hex digits, or as two 64-bit numbers in NumPy's files. Here it
is 16 bytes, most significant first, as numpy's `S16`: these sort as the hex digits do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipcluster.errors import UserError
from tools.convert.readers.tar_samples import TarSamples, record_of
from tools.convert.records import Record

NBYTES = 16
_HEX = re.compile(r"[0-9a-fA-F]{1,32}")
_NUMPY = b"\x93NUMPY"
_LINE = re.compile(rb"[0-9a-fA-F]{32}\s")


@dataclass
class Chosen:
    """The samples taken, by number; `key(position, own, members)` is the key of one, whose own is `own`."""

    samples: TarSamples
    numbers: np.ndarray
    key: Callable[[int, str, Mapping[str, bytes]], str]
    notes: Sequence[str]

    def sizes(self) -> np.ndarray:
        """Bytes of each image, (n,) int64."""
        return np.asarray(self.samples.image_bytes[self.numbers])

    def read(self, position: int, caption_field: str | None) -> Record:
        """One sample, with captions as `record_of` finds them."""
        key, members = self.samples.read(int(self.numbers[position]))
        return record_of(self.key(position, key, members), members, caption_field)


def uid_label(key: str, data: bytes | None) -> bytes:
    """The uid and a byte that tells even one of zeros from none."""
    uid = uid_of(key, data)
    return b"" if uid is None else uid + b"\1"


def field_label(field: str, key: str, data: bytes | None) -> bytes:
    """A hash of a field of the json."""
    try:
        value = json.loads(data or b"")[field]
    except (ValueError, LookupError, TypeError, RecursionError):
        value = None
    if value is None:
        return b""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=NBYTES).digest()


def by_uids(samples: TarSamples, file: Path) -> Chosen:
    """The samples of the file's uids, each as often as it stands there, in the order of the shards."""
    wanted, times = np.unique(read_uids(file), return_counts=True)
    known = samples.labels != b""
    labels = samples.labels.astype(f"S{NBYTES}")
    at = np.minimum(np.searchsorted(wanted, labels), len(wanted) - 1)
    found = known & (wanted[at] == labels) if len(wanted) else np.zeros(len(labels), bool)
    numbers = np.flatnonzero(found)
    numbers = numbers[first_of_each(labels[numbers])]
    counts = times[at[numbers]]
    repeats = _numbered(counts)
    notes = [
        f"{len(numbers):,} of the {len(wanted):,} uids of {file} are there, "
        f"{len(repeats):,} samples with repeats"
    ]
    again, without = int(found.sum()) - len(numbers), int((~known).sum())
    if again:
        notes.append(f"{again:,} samples have a uid that came before, and are left out")
    if without:
        notes.append(f"{without:,} samples without a uid are left out")

    def key(position: int, own: str, members: Mapping[str, bytes]) -> str:
        uid = uid_of(own, members.get("json"))
        assert uid is not None, "the sample was found by its uid"
        return f"{uid.hex()}-{repeats[position]}"

    return Chosen(samples, np.repeat(numbers, counts), key, notes)


def all_or_once(samples: TarSamples, once: str | None) -> Chosen:
    """All samples, or the first of those with one label; a key that comes again gets a number."""
    numbers, notes = np.arange(len(samples)), []
    if once:
        known = samples.labels != b""
        taken = ~known | first_of_each(samples.labels)
        numbers = np.flatnonzero(taken)
        notes.append(f"{len(taken) - len(numbers):,} samples with a {once} that came before are left out")
        without = int((~known).sum())
        notes += [f"{without:,} samples without {once} are all taken"] if without else []
    keys = samples.keys[numbers]
    repeats = _repeats(keys)
    again = np.flatnonzero(repeats)
    dash = _dash(keys, [(keys[at], repeats[at]) for at in again])
    if len(again):
        notes.append(
            f"{len(again):,} samples have a key that came before, and are named KEY{dash}1 and so on"
        )

    def key(position: int, own: str, members: Mapping[str, bytes]) -> str:
        return f"{own}{dash}{repeats[position]}" if repeats[position] else own

    return Chosen(samples, numbers, key, notes)


def _repeats(values: np.ndarray) -> np.ndarray:
    """How often each value came before, (n,) int64."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    repeats = np.empty(len(values), np.int64)
    repeats[np.argsort(group, kind="stable")] = _numbered(counts)
    return repeats


def _numbered(counts: np.ndarray) -> np.ndarray:
    """0 to count - 1 for each of these counts, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _dash(keys: np.ndarray, again: Sequence[tuple[bytes, int]]) -> str:
    """What parts a key that came before from its number, so that no such name is another sample's key."""
    dash = "-"
    while again and np.isin([b"%s%s%d" % (key, dash.encode(), number) for key, number in again], keys).any():
        dash += "-"
    return dash


def first_of_each(values: np.ndarray) -> np.ndarray:
    """Whether a value comes here for the first time, (n,) bool."""
    first = np.zeros(len(values), bool)
    first[np.unique(values, return_index=True)[1]] = True
    return first


def _from_hex(text: object) -> bytes | None:
    """The 16 bytes of a uid in hex; None for anything else. DataComp pads short ones with zeros."""
    if isinstance(text, str) and _HEX.fullmatch(text):
        return int(text, 16).to_bytes(NBYTES, "big")
    return None


def uid_of(key: str, data: bytes | None) -> bytes | None:
    """The uid of a sample: its json's, else the key (without the `-j` of a repeat) if it is one."""
    try:
        fields = json.loads(data or b"")
    except (ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict) and "uid" in fields:
        return _from_hex(fields["uid"])
    name = key.rpartition("/")[2]
    return _from_hex(name[:32]) if len(name) == 32 or name[32:33] == "-" else None


def read_uids(path: Path) -> np.ndarray:
    """The uids of a file in its order, repeats included, (n,) S16.

    The file is `.npy` of dtype `u8,u8` (upper, lower 64 bits), the same as raw bytes, or text with one uid a
    line. UserError for anything else.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give DataComp's uid file (.npy, raw or text)") from None
    if _LINE.match(start):
        return _of_lines(path.read_text(encoding="ascii", errors="replace").split(), path)
    if start.startswith(_NUMPY):
        array = np.load(path, mmap_mode="r")
        if array.dtype.names is None or len(array.dtype.names) != 2 or array.ndim != 1:
            raise UserError(
                f"{path}: an array of {array.dtype}, shape {array.shape}; uids have dtype u8,u8, shape (n,)"
            )
    elif path.stat().st_size % NBYTES:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes are not a uid file: expected .npy of dtype u8,u8, "
            "the same as raw bytes (16 a uid), or text with one uid a line"
        )
    else:
        array = np.fromfile(path, "<u8,<u8")
    upper, lower = array.dtype.names
    pairs = np.empty((len(array), 2), ">u8")
    pairs[:, 0], pairs[:, 1] = array[upper], array[lower]
    return pairs.view(f"S{NBYTES}").ravel()


def _of_lines(lines: list[str], path: Path) -> np.ndarray:
    uids = [_from_hex(line) for line in lines]
    if None in uids:
        raise UserError(f"{path}: line {uids.index(None) + 1} is not a uid: {lines[uids.index(None)][:40]!r}")
    return np.frombuffer(b"".join(uid for uid in uids if uid), f"S{NBYTES}")
