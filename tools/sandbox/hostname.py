"""Runs a command under the host name "localhost": `python hostname.py COMMAND …`.

SLURM listens on the address of the machine's own name. Where that is not loopback, the sandbox's daemons
are started by this program, in a namespace of their own for the host name. Where the system does not allow
that alone, a user namespace is made with it, in which the user stays the same. Exits with 71 where the
system allows neither.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from pathlib import Path

CLONE_NEWUTS = 0x04000000
CLONE_NEWUSER = 0x10000000
REFUSED = 71


def enter(name: str = "localhost") -> None:
    """Give this process a host name of its own; raises OSError if the system does not allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUTS) != 0:
        if libc.unshare(CLONE_NEWUTS | CLONE_NEWUSER) != 0:
            raise OSError(ctypes.get_errno(), "no namespace")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    socket.sethostname(name)


if __name__ == "__main__":
    try:
        enter()
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
    os.execvp(sys.argv[1], sys.argv[1:])
