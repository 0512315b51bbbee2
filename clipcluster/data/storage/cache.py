"""A bounded folder of remote shards, shared by the processes of a node. Imports no torch.

    SHA256.tar, KEY.idx     whole files, named by what they hold; the last use is their mtime
    NAME.N.part             a file on its way; at its full length from the start, so that it counts
    lists/KEY/index.bin     indexes; never evicted while somebody holds them (`hold`), or has lately

Locks are flock's: they end with the process that holds them. One per file (striped), so that a file is
fetched once; one for the space, held only while it is counted. A reader's handle holds a shared lock on its
file, which eviction leaves alone while it can; a file that is unlinked stays readable to who has it open.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
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
_numbers = itertools.count()


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
        name = f"{sha256}.tar"
        return self._open(name, size, partial(download, address, size=size, sha256=sha256), again=again)

    def shard_index(self, address: str, key: str, *, again: bool = False) -> int:
        """An open handle on a shard's index; `key` identifies the content that it belongs to."""
        name = f"{hashlib.sha256(f'{address} {key}'.encode()).hexdigest()}.idx"
        return self._open(name, None, partial(download, address), again=again)

    def unnamed(self, address: str) -> tuple[int, Got]:
        """A handle on a file whose hash is not known yet, and what was fetched; it is kept as a shard."""
        root = self.root
        with self._fetched(root, "unnamed", address, partial(download, address)) as (part, fd, got):
            self._keep(root, part, root / f"{got.sha256}.tar")
        fcntl.flock(fd, fcntl.LOCK_SH)
        return fd, got

    def index(self, folder: RemoteFolder, table: str, words: str) -> Path | None:
        """A local folder with the list `table` of a remote folder, as it is there now, and the text `words`.

        None if the remote folder has no list. Forbidden if the server keeps it, OSError if it is unreachable.
        """
        source = (folder / table).address
        try:
            state = state_of(source)
        except FileNotFoundError:
            return None
        root = self.root
        known = f"{source} {state.size} {state.stamp}" if state.stamp else ""
        with self._lock(root, source):
            place = root / _LISTS / hashlib.sha256(known.encode()).hexdigest()[:32]
            if not known or not self._is_kept(root, place / table):
                place = self._fetch_list(root, folder, table, words, place if known else None)
        return place

    def _is_kept(self, root: Path, table: Path) -> bool:
        """Whether a list is here; it counts as used now. Under the lock: an eviction may be under way."""
        with self._lock(root, "space"), contextlib.suppress(FileNotFoundError):
            os.utime(table)
            return True
        return False

    def _fetch_list(
        self, root: Path, folder: RemoteFolder, table: str, words: str, place: Path | None
    ) -> Path:
        """Fetches a list and the text beside it; without a `place`, into one named by its content."""
        source = (folder / table).address
        with self._fetched(root, "list", source, partial(download, source)) as (part, fd, got):
            place = place or root / _LISTS / got.sha256[:32]
            place.mkdir(exist_ok=True)
            text = read_beside(folder, words)
            if text is not None:
                (place / words).write_bytes(text)
            self._keep(root, part, place / table)
        os.close(fd)
        return place

    def _open(self, name: str, size: int | None, fetch: Callable[..., Got], *, again: bool = False) -> int:
        root = self.root
        path = root / name
        fd = None if again else _opened(path, size)
        if fd is not None:
            return fd
        with self._lock(root, name):
            fd = None if again else _opened(path, size)
            if fd is None:
                with self._fetched(root, name, name, fetch) as (part, fd, _):
                    self._keep(root, part, path)
                fcntl.flock(fd, fcntl.LOCK_SH)
            return fd

    @contextlib.contextmanager
    def _fetched(
        self, root: Path, name: str, what: str, fetch: Callable[..., Got]
    ) -> Iterator[tuple[Path, int, Got]]:
        """A file aside with what `fetch` brings, synced, and its handle; both are removed after an error.

        It is locked while it is written: one without a lock was left by a killed process.
        """
        part = root / f"{name}.{os.getpid()}-{next(_numbers)}.part"
        with self._lock(root, "space"):
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            got = fetch(fd, reserve=partial(self._reserve, root, fd, part, what))
            os.fsync(fd)
            yield part, fd, got
        except BaseException:
            part.unlink(missing_ok=True)
            os.close(fd)
            raise

    def _keep(self, root: Path, part: Path, path: Path) -> None:
        """Gives a finished file its name; under the lock, as a listing at that moment may miss both names."""
        with self._lock(root, "space"):
            path.parent.mkdir(exist_ok=True)
            os.replace(part, path)

    @contextlib.contextmanager
    def _lock(self, root: Path, name: str) -> Iterator[None]:
        """Held by one process, or thread, at a time; names share 4,096 lock files."""
        file = name if name == "space" else hashlib.sha256(name.encode()).hexdigest()[:3]
        fd = os.open(root / _LOCKS / file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _acquire(fd, root)
            yield
        finally:
            os.close(fd)

    def _reserve(self, root: Path, fd: int, part: Path, what: str, size: int) -> None:
        """Gives `part` its length once there is room for it, evicting what was used longest ago.

        It never gets shorter: what is written stays.
        """
        if size > self.size:
            raise DataError(
                f"{redacted(what)} has {size:,} bytes and the cache holds {self.size:,}",
                "set data.cache.size to several times the largest shard",
            )
        deadline = time.monotonic() + WAIT_S
        while True:
            with self._lock(root, "space"):
                others = [entry for entry in _entries(root) if entry.path != part]
                missing = self._missing(root, others, size)
                if missing > 0:
                    missing = _evict(others, missing)
                if missing <= 0:
                    os.ftruncate(fd, max(size, os.fstat(fd).st_size))
                    return
            if not any(entry.path.suffix == ".part" for entry in others) or time.monotonic() > deadline:
                raise OSError(
                    errno.ENOSPC,
                    f"no space for {size:,} bytes of {redacted(what)}: {missing:,} more are needed than "
                    f"can be freed (the cache holds at most {self.size:,})",
                    str(root),
                )
            time.sleep(0.1)  # for the other downloads: what they bring can be evicted

    def _missing(self, root: Path, others: list[_Entry], size: int) -> int:
        """Bytes to free before `size` more fit into the cache, and onto the disk with a hundredth left."""
        disk = os.statvfs(root)
        free = disk.f_bavail * disk.f_frsize - disk.f_blocks * disk.f_frsize // 100
        beyond_the_bound = sum(entry.size for entry in others) + size - self.size
        beyond_the_disk = size + sum(entry.unwritten for entry in others) - free
        return max(beyond_the_bound, beyond_the_disk)


def hold(path: Path) -> int:
    """A handle that keeps a file of the cache from being evicted, until it is closed. FileNotFoundError."""
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def _acquire(fd: int, root: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise UserError(
            f"{root}: this file system supports no locks, which processes that share the cache need; set "
            "data.cache.folder to a folder on a local disk"
        ) from None


def _opened(path: Path, size: int | None) -> int | None:
    """A handle on a whole file, marked as in use and as used now; None if it is not there."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if size is not None and os.fstat(fd).st_size != size:
        os.close(fd)
        return None
    fcntl.flock(fd, fcntl.LOCK_SH)
    os.utime(fd)
    return fd


def _entries(root: Path) -> list[_Entry]:
    """Every file that counts; what killed processes and old indexes left is removed on the way."""
    found = []
    for entry in os.scandir(root):
        if not entry.is_file(follow_symlinks=False):
            continue
        try:
            state = entry.stat()
        except FileNotFoundError:
            continue
        path = Path(entry.path)
        if path.suffix == ".part" and _if_free(path, unlink=True):
            continue
        unwritten = max(0, state.st_size - 512 * state.st_blocks) if path.suffix == ".part" else 0
        found.append(_Entry(path, state.st_size, state.st_mtime, unwritten))
    return found + list(_lists(root))


def _lists(root: Path) -> Iterator[_Entry]:
    for folder in os.scandir(root / _LISTS):
        files = [(Path(entry.path), entry.stat()) for entry in os.scandir(folder.path)]
        newest = max((state.st_mtime for _, state in files), default=time.time())
        if newest < time.time() - 86400 * LIST_DAYS:
            if all(_if_free(path, unlink=False) for path, _ in files):
                shutil.rmtree(folder.path, ignore_errors=True)
                continue
            for path, _ in files:
                os.utime(path)  # it is held: its age starts again
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
    removable = sorted(
        (entry for entry in entries if entry.path.suffix in (".tar", ".idx")), key=lambda entry: entry.used
    )
    kept = []
    for entry in removable:
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
