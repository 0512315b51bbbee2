"""What a reader of foreign data hands to the converter: samples by number, as they were found.

A reader is a module of `tools.convert.readers`; it opens its inputs and answers for each split how many
samples there are, what one of them is, and what the inputs were, so that a conversion can be cut into shards
before a byte is read, done by any number of processes, and gone on with later.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class BadRecord(Exception):
    """A sample that cannot be used: `key` as far as it can be told, `reason` in a few words."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


class Record(NamedTuple):
    """One sample: the image's original bytes, its captions, and what else is known of it.

    `fields` go into `KEY.json` beside the captions; `members` (extension to bytes) are written as they are.
    """

    key: str
    image: bytes
    captions: Sequence[str] = ()
    fields: Mapping[str, Any] = {}
    cls: int | None = None
    members: Mapping[str, bytes] = {}


class WholeRecord(NamedTuple):
    """A sample that goes over as it is: `members`, extension to bytes, in the order they are written.

    One of them is an image by its extension.
    """

    key: str
    members: Mapping[str, bytes]


class InputFile(NamedTuple):
    """A file that was read, as it was: another size or time is a changed input. Times in ns.

    A folder of many small files may stand for them: the sum of their bytes, the latest time, and in `digest`
    a hash over their names, sizes and times.
    """

    path: str
    bytes: int
    mtime_ns: int
    digest: str = ""

    @classmethod
    def of(cls, path: Path) -> InputFile:
        """The state of a file. OSError if it is not there."""
        state = path.stat()
        return cls(os.path.abspath(path), state.st_size, state.st_mtime_ns)

    @classmethod
    def of_many(cls, path: str, states: Iterable[tuple[str, int, int]]) -> InputFile:
        """The files behind `path` as one: name, bytes and time of each, in a settled order."""
        total = latest = 0
        digest = hashlib.sha256()
        for name, size, mtime_ns in states:
            total, latest = total + size, max(latest, mtime_ns)
            digest.update(b"%b\0%d %d\n" % (os.fsencode(name), size, mtime_ns))
        return cls(path, total, latest, digest.hexdigest())


@dataclass(frozen=True)
class Split:
    """A folder of shards to be: `name` below the output folder (empty: the output folder itself).

    `sizes()` are the bytes of each sample's image as far as they are known beforehand, (length,) int64.
    `read(number)` is called in any order and from forked processes, so what these cannot share is opened on
    first use in each; it raises BadRecord for a sample that cannot be used and OSError where the disk fails.
    `files` are written beside the shards, by name (`classnames.txt`, …). `account(left_out, captions)` says
    where what was read went, given the numbers of the bad samples and of the captions written.
    """

    name: str
    length: int
    sizes: Callable[[], np.ndarray]
    read: Callable[[int], Record | WholeRecord]
    files: Mapping[str, str] = field(default_factory=dict)
    account: Callable[[Sequence[int], int], list[tuple[str, int]]] | None = None

    def __len__(self) -> int:
        return self.length


@dataclass(frozen=True)
class Source:
    """Opened inputs: their splits, and the files behind them. `notes` are said once, to the user."""

    splits: Sequence[Split]
    inputs: Sequence[InputFile]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class NoOptions:
    """For kinds without options of their own."""


@dataclass(frozen=True)
class Kind:
    """One kind of input. A reader's module calls its own `KIND`.

    `help` is one line. `options` is a frozen dataclass whose fields are the kind's own options: a field's
    metadata has `help` (and `metavar`), its default is the option's. `inputs` describes INPUT … for the help;
    empty: there are none. `open` raises UserError for inputs that are not what they should be.
    `samples_per_shard` holds where the user gives none. `takes_all_below`: whatever lies below an input
    folder is input too, so the shards must not.
    """

    help: str
    open: Callable[[Sequence[Path], Any], Source]
    inputs: str = ""
    options: type = NoOptions
    samples_per_shard: int = 10_000
    takes_all_below: bool = False


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of a kind's options. `more` is typer's, but for `flag`: the option's name if not --NAME."""
    return field(default=default, metadata={"help": help, **more})
