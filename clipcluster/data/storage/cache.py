"""A bounded folder of remote shards, shared by the processes of a node. Imports no torch.

    SHA256.tar, KEY.idx     whole files, named by what they hold, or by address and state; the last use is
                            their mtime
    NAME.TOKEN.part         a file on its way; at its full length from the start, so that it counts
    lists/KEY/index.bin     indexes; never evicted while somebody holds them (`hold`), or has lately

Locks are flock's: they end with the process that holds them. One per file (striped), so that a file is
fetched once; one for the space, held only while it is counted. A reader's handle holds a shared lock on its
file, which eviction leaves alone while it can; a file that is unlinked stays readable to who has it open.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from clipcluster.data.storage.download import Got, download, read_beside, state_of
from clipcluster.data.storage.urls import RemoteFolder, redacted
from clipcluster.errors import UserError
from clipcluster.runtime.outcome import DataError

if TYPE_CHECKING:
    from clipcluster.recipe.sections.data import Cache as Section

SIZE = 100 << 30  # bytes of a cache that nobody set the size of
WAIT_S = 600.0  # for other processes' downloads that take all the room
LIST_DAYS = 30  # an index that nobody opened for so long is removed

_LISTS = "lists"
_LOCKS = "locks"


class _Entry(NamedTuple):
    path: Path
    size: int
    used: float
    unwritten: int  # bytes that count and take no disk yet


def default_folder() -> str:
    """`$CLIPCLUSTER_CACHE`, else a folder of the user's usual cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.environ.get("CLIPCLUSTER_CACHE") or f"{home}/clipcluster"


@dataclass(frozen=True)
class Cache:
    """The cache at `folder` (`~` and `$NAME` are read where it is used), of at most `size` bytes."""

    folder: str
    size: int = SIZE

    @classmethod
    def of(cls, section: "Section") -> "Cache":
        """The cache of a recipe's `data.cache`."""
        return cls(section.folder or default_folder(), section.size.megabytes << 20)

    @property
    def root(self) -> Path:
        """The folder here, made if it is not there. UserError if it cannot be."""
        path = os.path.expanduser(os.path.expandvars(self.folder))
        if "$" in path or not os.path.isabs(path):
            raise UserError(
                f"data.cache.folder {self.folder!r} is {path!r} here; give an absolute path, and set "
                "every environment variable in it on the node"
            )
        try:
            for folder in (path, f"{path}/{_LOCKS}", f"{path}/{_LISTS}"):
                os.makedirs(folder, 0o700, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the cache of remote shards cannot be made at {path} ({error.strerror}); set "
                "data.cache.folder or $CLIPCLUSTER_CACHE to a folder on a local disk"
            ) from None
        return Path(path)

    def shard(self, address: str, size: int, sha256: str, *, again: bool = False) -> int:
        """An open handle on a shard with these bytes, fetched if it is not here, or if `again`.

        Raises what `download` raises (OtherContent, FileNotFoundError, OSError), and DataError if it is
        larger than the whole cache.
        """
        return self._open(address, f"{sha256}.tar", again, size, sha256)

    def shard_index(self, address: str, key: str, *, again: bool = False) -> int:
        """An open handle on a shard's index; `key` identifies the content that it belongs to."""
        return self._open(address, f"{hashlib.sha256(f'{address} {key}'.encode()).hexdigest()}.idx", again)

    def unnamed(self, address: str) -> tuple[int, Got]:
        """A handle on a file whose hash is not known yet, and what was fetched; it is kept as a shard."""
        return self._fetched(address, "unnamed", lambda got: self.root / f"{got.sha256}.tar")

    def current(self, address: str) -> int:
        """A handle on a file as its server has it now, fetched unless that is here.

        A file of which the server tells neither a time nor a tag is fetched every time.
        """
        state = state_of(address)
        if not state.stamp:
            return self.unnamed(address)[0]
        name = hashlib.sha256(f"{address} {state.size} {state.stamp}".encode()).hexdigest()
        return self._open(address, f"{name}.tar", False, state.size)

    def index(self, folder: RemoteFolder, table: str, words: str) -> Path | None:
        """A local folder with the list `table` of a remote folder, as it is there now, and the text `words`.

        None if the remote folder has no list. Forbidden if the server keeps it, OSError if it is unreachable.
        """
        source = (folder / table).address
        try:
            state = state_of(source)
        except FileNotFoundError:
            return None
        name = hashlib.sha256(f"{source} {state.size} {state.stamp}".encode()).hexdigest()

        def placed(got: Got) -> Path:
            nonlocal name
            name = name if state.stamp else got.sha256
            place = self.root / _LISTS / name[:32]
            place.mkdir(exist_ok=True)
            text = read_beside(folder, words)
            if text is not None:
                (place / words).write_bytes(text)
            return place / table

        with self._lock(source):
            known = self.root / _LISTS / name[:32]
            with self._lock("space"), contextlib.suppress(FileNotFoundError):  # an eviction may be under way
                if state.stamp:
                    _mark_used(known / table)
                    return known
            fd, _ = self._fetched(source, "list", placed)
        os.close(fd)
        return self.root / _LISTS / name[:32]

    def _open(
        self, address: str, name: str, again: bool, size: int | None = None, sha256: str | None = None
    ) -> int:
        path = self.root / name
        fd = None if again else _opened(path, size)
        if fd is not None:
            return fd
        with self._lock(name):
            fd = None if again else _opened(path, size)
            return self._fetched(address, name, lambda _: path, size, sha256)[0] if fd is None else fd

    def _fetched(
        self,
        address: str,
        name: str,
        placed: Callable[[Got], Path],
        size: int | None = None,
        sha256: str | None = None,
    ) -> tuple[int, Got]:
        """A handle on a fetched file, which is renamed to the path that `placed` gives it once it is whole.

        It is locked while it is written aside: one without a lock was left by a killed process.
        """
        part = self.root / f"{name}.{secrets.token_hex(8)}.part"
        with self._lock("space"):
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            reserve = partial(self._reserve, fd, part, address)
            got = download(address, fd, reserve=reserve, size=size, sha256=sha256)
            os.fsync(fd)
            _mark_used(fd)
            path = placed(got)
            with self._lock("space"):  # a listing at that moment may miss both names
                path.parent.mkdir(exist_ok=True)  # an eviction may have removed a list of old
                os.replace(part, path)
            fcntl.flock(fd, fcntl.LOCK_SH)
            return fd, got
        except BaseException:
            part.unlink(missing_ok=True)
            os.close(fd)
            raise

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Held by one process, or thread, at a time; names share 4,096 lock files."""
        file = name if name == "space" else hashlib.sha256(name.encode()).hexdigest()[:3]
        root = self.root
        fd = os.open(root / _LOCKS / file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                raise UserError(
                    f"{root}: this file system supports no locks, which processes that share the cache need; "
                    "set data.cache.folder to a folder on a local disk"
                ) from None
            yield
        finally:
            os.close(fd)

    def _reserve(self, fd: int, part: Path, address: str, size: int) -> None:
        """Gives `part` its length once there is room for it, evicting what was used longest ago.

        It never gets shorter: what is written stays.
        """
        if size > self.size:
            raise DataError(
                f"{redacted(address)} has {size:,} bytes and the cache holds {self.size:,}",
                "set data.cache.size to several times the largest shard",
            )
        root, deadline = self.root, time.monotonic() + WAIT_S
        while True:
            with self._lock("space"):
                others = [entry for entry in _entries(root) if entry.path != part]
                disk = os.statvfs(root)  # a hundredth of it is left
                free = disk.f_bavail * disk.f_frsize - disk.f_blocks * disk.f_frsize // 100
                beyond_the_disk = size + sum(entry.unwritten for entry in others) - free
                beyond_the_bound = size + sum(entry.size for entry in others) - self.size
                missing = _evict(others, max(beyond_the_bound, beyond_the_disk))
                if missing <= 0:
                    os.ftruncate(fd, max(size, os.fstat(fd).st_size))
                    return
            if not any(entry.path.suffix == ".part" for entry in others) or time.monotonic() > deadline:
                raise OSError(
                    errno.ENOSPC,
                    f"no space for {size:,} bytes of {redacted(address)}: {missing:,} more are needed than "
                    f"can be freed (the cache holds at most {self.size:,})",
                    str(root),
                )
            time.sleep(0.1)  # for the other downloads: what they bring can be evicted


def hold(path: Path) -> int:
    """A handle that keeps a file of the cache from being evicted, until it is closed. FileNotFoundError."""
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def _opened(path: Path, size: int | None) -> int | None:
    """A handle on a whole file, marked as in use and as used now; None if it is not there."""
    try:
        fd = hold(path)
    except FileNotFoundError:
        return None
    if size is not None and os.fstat(fd).st_size != size:
        os.close(fd)
        return None
    _mark_used(fd)
    return fd


def _mark_used(file: int | Path) -> None:
    """The time of its last use: now. By this clock: the kernel's own stamps of one tick (4 ms) are equal."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _entries(root: Path) -> list[_Entry]:
    """Every file that counts; what killed processes and old indexes left is removed on the way."""
    found = list(_lists(root))
    for entry in os.scandir(root):
        with contextlib.suppress(FileNotFoundError):
            path, state = Path(entry.path), entry.stat(follow_symlinks=False)
            part = path.suffix == ".part"
            if entry.is_dir() or (part and _if_free(path, unlink=True)):
                continue
            unwritten = max(0, state.st_size - 512 * state.st_blocks) if part else 0
            found.append(_Entry(path, state.st_size, state.st_mtime, unwritten))
    return found


def _lists(root: Path) -> Iterator[_Entry]:
    for folder in os.scandir(root / _LISTS):
        files = [(Path(entry.path), entry.stat()) for entry in os.scandir(folder.path)]
        newest = max((state.st_mtime for _, state in files), default=time.time())
        if newest < time.time() - 86400 * LIST_DAYS:
            if all(_if_free(path, unlink=False) for path, _ in files):
                shutil.rmtree(folder.path, ignore_errors=True)
                continue
            for path, _ in files:
                _mark_used(path)  # it is held: its age starts again
        for path, state in files:
            yield _Entry(path, state.st_size, state.st_mtime, 0)


def _if_free(path: Path, *, unlink: bool) -> bool:
    """Whether nobody holds a lock on a file, or it is gone; then, with `unlink`, it is removed under one."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if unlink:
            path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _evict(entries: list[_Entry], missing: int) -> int:
    """Removes files until so many bytes are free, the longest unused first; returns what is still missing.

    What somebody has open goes only after all else: its bytes stay on the disk until it is closed.
    """
    removable = [entry for entry in entries if entry.path.suffix in (".tar", ".idx")]
    kept = []
    for entry in sorted(removable, key=lambda entry: entry.used):
        if missing <= 0:
            return missing
        if _if_free(entry.path, unlink=True):
            missing -= entry.size
        else:
            kept.append(entry)
    for entry in kept:
        if missing <= 0:
            break
        entry.path.unlink(missing_ok=True)
        missing -= entry.size
    return missing
