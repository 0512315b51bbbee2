"""The shards of a folder on this machine, by name."""

import os
from pathlib import Path

from clipcluster.errors import UserError

_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".tar.lz4")


def find_shards(folder: Path) -> list[Path]:
    """The tars of a folder by name; UserError if there is no such folder, or none in it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder that holds .tar shards")
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    tars = [folder / name for name in names if name.endswith(".tar")]
    if tars:
        return tars
    packed = compressed_tars(folder)
    if packed:
        raise UserError(
            f"{folder}: {packed[0]} is compressed and cannot be read by offset; unpack it to .tar first"
        )
    below = [name for name in names if next((folder / name).glob("*.tar"), None) is not None]
    if below:
        raise UserError(f"{folder}: the shards lie in its folders {', '.join(below[:5])}; give one of them")
    raise UserError(
        f"{folder}: no .tar shards in this folder; shards are made by: clipcluster shards convert"
    )


def compressed_tars(folder: Path) -> list[str]:
    """Names of compressed tars, by name; they cannot be read by offset."""
    names = (entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    return sorted(name for name in names if name.endswith(_COMPRESSED))
