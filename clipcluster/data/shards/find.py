"""The shards of a folder on this machine, by name, and the folders of shards that one given by hand means."""

import os
from pathlib import Path

from clipcluster.errors import UserError

SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")  # in their order

_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".tar.lz4")


def find_shards(folder: Path) -> list[Path]:
    """The tars of a folder by name; UserError if there is no such folder, or none in it."""
    if not folder.is_dir():
        wrong = "is a file" if folder.is_file() else "no such folder"
        raise UserError(f"{folder}: {wrong}; give a folder that holds .tar shards")
    tars = _named(folder, ".tar")
    if tars:
        return [folder / name for name in tars]
    packed = compressed_tars(folder)
    if packed:
        raise UserError(
            f"{folder}: {packed[0]} is compressed and cannot be read by offset; unpack it to .tar first"
        )
    below = [path.name for path in _subfolders(folder) if _named(path, ".tar")]
    if below:
        raise UserError(f"{folder}: the shards are in its folders {', '.join(below[:5])}; give one of them")
    raise UserError(
        f"{folder}: no .tar shards in this folder; shards are made by: clipcluster shards convert"
    )


def folders_of_shards(folder: Path) -> list[Path]:
    """The folders of shards that one means: itself, its splits (train, val, test), or its only subfolder.

    A folder that holds tars is itself alone. Splits come in the order train, val, test; of an only subfolder
    its own splits may be meant. UserError as `find_shards` for a folder that means none, and where its
    subfolders are several and no splits.
    """
    if not folder.is_dir() or _named(folder, ".tar"):
        return [folder]
    below = _subfolders(folder)
    places = [folder / split for split in SPLITS]
    splits = [place for place in places if place in below and _named(place, ".tar")]
    if splits:
        return splits
    if len(below) == 1:
        return folders_of_shards(below[0])
    find_shards(folder)  # raises with what is there instead
    raise AssertionError("unreachable")


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def compressed_tars(folder: Path) -> list[str]:
    """Names of compressed tars, by name; they cannot be read by offset."""
    return _named(folder, *_COMPRESSED)


def _named(folder: Path, *endings: str) -> list[str]:
    """The visible names in a folder with one of these endings, sorted."""
    names = (entry.name for entry in os.scandir(folder))
    return sorted(name for name in names if name.endswith(endings) and not name.startswith("."))
