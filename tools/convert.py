"""`clipcluster shards convert KIND --out DIR`: data of many kinds into indexed shards."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clipcluster.data.index import LIST, TABLE, IndexSummary, read_summary
from clipcluster.data.shards import open_folder
from clipcluster.errors import UserError
from tools import digits


@dataclass(frozen=True)
class Conversion:
    """`made` is False if the folder was there already, finished, and nothing was done."""

    out: Path
    made: bool
    splits: dict[str, IndexSummary]


@dataclass(frozen=True)
class Kind:
    """How one kind of data is written, and the splits it makes below the output folder."""

    write: Callable[[Path], dict[str, IndexSummary]]
    splits: tuple[str, ...]


KINDS = {"digits": Kind(digits.write_digits, digits.SPLITS)}


def convert(kind: str, out: Path) -> Conversion:
    """Converts into `out`, which appears wholly or not at all; a finished one is left as it is.

    UserError: an unknown kind, or an output folder that holds something else.
    """
    if kind not in KINDS:
        raise UserError(f"convert {kind!r}: no such kind of input; there are: {', '.join(sorted(KINDS))}")
    chosen = KINDS[kind]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return Conversion(out, False, _finished(chosen, out))
    aside = out.with_name(f".{out.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        chosen.write(aside)
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rmdir()  # empty, as seen above
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Conversion(out, True, _finished(chosen, out))


def _finished(kind: Kind, out: Path) -> dict[str, IndexSummary]:
    """The splits of a finished conversion; UserError if it is none, or a shard is not what the index says."""
    folders = [out / split for split in kind.splits]
    if not all((folder / LIST).is_file() and (folder / TABLE).is_file() for folder in folders):
        raise UserError(f"{out} is there and holds something else; give another --out, or remove it first")
    return {folder.name: _summary(folder) for folder in folders}


def _summary(folder: Path) -> IndexSummary:
    shards = open_folder(folder)
    shards.check_unchanged()
    return read_summary(folder)
