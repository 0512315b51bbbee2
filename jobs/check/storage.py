"""Whether the checkpoints of a run fit on the disk of its folder: free space, quota, speed."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clipcluster.check.plain import Findings
from clipcluster.recipe.plan import Plan
from clipcluster.recipe.sections.checkpoint import Keep
from clipcluster.runs.checkpoints import name_of, steps_in
from clipcluster.runs.files import size_of
from clipcluster.runs.folder import Run
from clipcluster.runs.mounts import mount_of
from clipcluster.text import counted, sized

QUOTA_SECONDS = 2.0  # how long a program that tells quotas may take
PROBE_BYTES = 64 << 20  # written to measure the speed of a disk
_CHUNK = 4 << 20


def kept_checkpoints(keep: Keep, plan: Plan) -> tuple[int, int]:
    """How many checkpoints the rotation keeps at least (the last ones), and at the end of the run."""
    last = keep.last
    if plan.checkpoint_every:
        last = min(last, 1 + plan.total_steps // plan.checkpoint_every)
    lasting = plan.total_steps // plan.keep_every if plan.keep_every else 0
    return last, last + lasting + (keep.best.count if keep.best else 0)


def size_of_newest(run: Run) -> int | None:
    """Bytes of the run's newest checkpoint; None before the first."""
    steps = steps_in(run.checkpoints)
    return size_of(run.checkpoints / name_of(steps[-1])) if steps else None


def compare(runs: Sequence[Run], size: int, keep: Keep, plan: Plan) -> Findings:
    """The findings about the space for checkpoints of `size` bytes, in `runs` that start together.

    One checkpoint more is there while it is written. What the runs have already is replaced.
    """
    found, count = Findings(), len(runs)
    least, most = kept_checkpoints(keep, plan)
    there, place = sum(size_of(run.checkpoints) for run in runs), existing(runs[0].path)
    free, quota = shutil.disk_usage(place).free, quota_left(place)
    left = "no quota found" if quota is None else f"{sized(quota.soft)} left of your quota"
    disk, each = f"{place} has {sized(free)} free, {left}", f"{sized(size)} each"
    of_all = f", of {counted(count, 'run')} together" if count > 1 else ""
    first, total = count * (least + 1) * size, count * (most + 1) * size
    text = f"{each}, {counted(most, 'checkpoint')} kept and one being written{of_all}: {sized(total)}"
    if first > there + (free if quota is None else min(free, quota.hard)):
        found.errors.append(
            f"checkpoint.keep: {each}, the last {least} and one being written{of_all} are {sized(first)}, "
            f"and {disk}; free space there, or choose a larger disk with --runs"
        )
    elif total > there + (free if quota is None else min(free, quota.soft)):
        found.warnings.append(
            f"checkpoint.keep: {text} in the whole run, and {disk}; keep fewer (checkpoint.keep.every, "
            "checkpoint.keep.best), free space there, or choose a larger disk with --runs"
        )
    else:
        found.summary.append(f"disk: {text}; {disk}")
    return found


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


class Quota(NamedTuple):
    """Bytes that a quota leaves: until nothing can be written, and until that is a matter of days."""

    hard: int
    soft: int


def quota_left(folder: Path) -> Quota | None:
    """What the quotas of this user and of a folder's group leave on its disk; None where none is told."""
    import psutil  # here: the check without sizes needs none of it

    mount = mount_of(folder.resolve(), psutil.disk_partitions(all=True))
    if mount is None:
        return None
    about = folder.stat()
    group = about.st_gid if about.st_mode & stat.S_ISGID else os.getegid()  # that of new files
    found = []
    for whose in (("-u", str(os.geteuid())), ("-g", str(group))):
        if mount.fstype == "lustre":
            found.append(parse_quota(_told("lfs", "quota", "-q", *whose, str(folder)), None))
        else:
            found.append(parse_quota(_told("quota", "-w", "-p", *whose), mount.device))
    told = [each for each in found if each is not None]
    return Quota(min(each.hard for each in told), min(each.soft for each in told)) if told else None


def _told(*command: str) -> str:
    """What a program prints; nothing where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=QUOTA_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def parse_quota(text: str, source: str | None) -> Quota | None:
    """What is left, from a table of `quota -w -p` or `lfs quota -q`: file system, kB used, quota, limit, ….

    source: the file system of the line; None: the only one. None where there is no limit.
    """
    words = text.split()
    for at, word in enumerate(words[:-3]):
        numbers = [number.rstrip("*") for number in words[at + 1 : at + 4]]
        if (word == source or (source is None and at == 0)) and all(map(str.isdecimal, numbers)):
            used, soft, hard = map(int, numbers)
            if not (soft or hard):
                return None
            lower = min(filter(None, (soft, hard)))
            return Quota(max(0, (hard or soft) - used) * 1024, max(0, lower - used) * 1024)
    return None


def write_speed(folder: Path, size: int) -> float:
    """Bytes per second at which a file is written, hashed and flushed to the disk of a folder, as in a save.

    A file of at most PROBE_BYTES is written and removed. Raises OSError.
    """
    size = max(_CHUNK, min(size, PROBE_BYTES))
    chunk, digest = os.urandom(_CHUNK), hashlib.sha256()
    with tempfile.TemporaryFile(prefix=".clipcluster-check-", dir=existing(folder), buffering=0) as stream:
        began = time.monotonic()
        for _ in range(size // _CHUNK):
            digest.update(chunk)
            stream.write(chunk)
        os.fsync(stream.fileno())
        return size // _CHUNK * _CHUNK / (time.monotonic() - began)
