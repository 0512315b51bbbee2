"""One process at a time, over a file that is gone afterwards."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class Held(Exception):
    """Another process holds the lock."""


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock `path`, made if needed; a holder that dies lets it go. Raises Held at once.

    On a file system that knows no locks everybody goes on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _take(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: nobody can have taken this file meanwhile
        os.close(descriptor)


def _take(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise Held(str(path)) from None
        except FileNotFoundError:
            pass  # its last holder removed it just before this process locked it
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)
