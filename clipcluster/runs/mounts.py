"""The file system that a folder is on, and whether other machines see at once what is written there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

# Of one machine alone: what is written there shows at once to all who can see it.
LOCAL = frozenset({"btrfs", "ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs", "zfs"})


class Mount(Protocol):
    """A mounted file system, as `psutil.disk_partitions` has it."""

    @property
    def device(self) -> str: ...

    @property
    def mountpoint(self) -> str: ...

    @property
    def fstype(self) -> str: ...


def mount_of(folder: Path, mounts: Sequence[Mount]) -> Mount | None:
    """Of the mounts, as psutil names them, the one that a folder is on; of several there the last is seen."""
    over = [each for each in mounts if folder.is_relative_to(each.mountpoint)]
    return max(reversed(over), key=lambda each: len(each.mountpoint), default=None)


def file_system(folder: Path) -> str:
    """The kind of file system that holds a folder, as the system names it: nfs4, lustre, ext4; else "?"."""
    import psutil  # here: few commands need it

    mount = mount_of(Path(os.path.realpath(folder)), psutil.disk_partitions(all=True))
    return mount.fstype if mount else "?"


def shows_late(folder: Path) -> bool:
    """Whether what another machine wrote there may show here after a while, as on NFS."""
    return file_system(folder) not in LOCAL
