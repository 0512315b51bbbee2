"""Lists of DataComp's uids: 128 bits, written as 32 hex digits, or as two 64-bit numbers in NumPy's files.

Here a uid is 16 bytes, most significant first, as numpy's `S16`: these sort as the hex digits do.
"""

import json
import re
from pathlib import Path

import numpy as np

from clipcluster.errors import UserError

NBYTES = 16
_HEX = re.compile(r"[0-9a-fA-F]{1,32}")
_NUMPY = b"\x93NUMPY"
_LINE = re.compile(rb"[0-9a-fA-F]{32}\s")
_PAIR = np.dtype("<u8,<u8")


def from_hex(text: object) -> bytes | None:
    """The 16 bytes of a uid in hex; None for anything else. DataComp pads short ones with zeros."""
    if isinstance(text, str) and _HEX.fullmatch(text):
        return int(text, 16).to_bytes(NBYTES, "big")
    return None


def uid_of(key: str, data: bytes | None) -> bytes | None:
    """The uid of a sample: its json's, else the key (without the `-j` of a repeat) if it is one."""
    try:
        fields = json.loads(data or b"")
    except (ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict) and "uid" in fields:
        return from_hex(fields["uid"])
    name = key.rpartition("/")[2]
    return from_hex(name[:32]) if len(name) == 32 or name[32:33] == "-" else None


def read_uids(path: Path) -> np.ndarray:
    """The uids of a file in its order, repeats included, (n,) S16.

    The file is `.npy` of dtype `u8,u8` (upper, lower 64 bits) or of hex strings, the same pairs as raw bytes,
    or text with one uid a line. UserError for anything else.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give DataComp's uid file (.npy, raw or text)") from None
    if start.startswith(_NUMPY):
        return _of_array(np.load(path, mmap_mode="r"), path)
    if _LINE.match(start):
        return _of_lines(path.read_text(encoding="ascii", errors="replace").split(), path)
    if path.stat().st_size % NBYTES:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes are not a uid file: expected .npy of dtype u8,u8, "
            "the same as raw bytes (16 a uid), or text with one uid a line"
        )
    return _of_array(np.fromfile(path, _PAIR), path)


def _of_array(array: np.ndarray, path: Path) -> np.ndarray:
    if array.dtype.kind in "SU":
        return _of_lines(
            [text.decode() if isinstance(text, bytes) else text for text in array.tolist()], path
        )
    if array.dtype.names is None or len(array.dtype.names) != 2 or array.ndim != 1:
        raise UserError(
            f"{path}: an array of {array.dtype}, shape {array.shape}; uids have dtype u8,u8, shape (n,)"
        )
    upper, lower = array.dtype.names
    pairs = np.empty((len(array), 2), ">u8")
    pairs[:, 0], pairs[:, 1] = array[upper], array[lower]
    return pairs.view(f"S{NBYTES}").ravel()


def _of_lines(lines: list[str], path: Path) -> np.ndarray:
    uids = [from_hex(line) for line in lines]
    if None in uids:
        raise UserError(f"{path}: line {uids.index(None) + 1} is not a uid: {lines[uids.index(None)][:40]!r}")
    return np.frombuffer(b"".join(uid for uid in uids if uid), f"S{NBYTES}")
