"""Tar files as bytes: where every member begins, and headers of our own.

Reads POSIX ustar, PAX (path and size records) and GNU (long names, base-256 sizes), by header alone.
Writes ustar, with a PAX header only where ustar cannot say it; the same member gives the same bytes.
"""

import errno
import os
import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

BLOCK = 512
END = bytes(2 * BLOCK)

NO_BYTES = -1
_REGULAR = (b"0", b"\0", b"7")
_LONG = (b"x", b"L")  # of PAX, and GNU's long names: of the member that follows
_WITH_BYTES = (*_REGULAR, *_LONG)
_SAMPLES_LOST = (b"1", b"2", b"S")  # hard and symbolic links, GNU's sparse files: names without plain bytes
_NO_BODY = (b"1", b"2", b"3", b"4", b"5", b"6")  # their size, where there is one, is of no bytes here
_LARGEST_OCTAL = 8**11 - 1
_ZEROS = bytes(BLOCK)
_WINDOW = 64 << 10  # bytes read at once where members are small
_RECORD = 1 << 20  # bytes looked at together behind the end
_FIRST_WINDOW = 4 * BLOCK  # a header, and what belongs to a small member
_LONGEST_NAME = 1 << 20  # bytes of a PAX or long-name header
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2", b"PK\3\4": "zip"
}  # fmt: skip


class BrokenTar(Exception):
    """The bytes are no valid tar from a byte on: the message says which and why."""


class Member(NamedTuple):
    """One regular file: `start` of its first header, `offset` and `size` of its bytes (all in bytes).

    Of a link or a sparse file, whose bytes are not to be had, the size is NO_BYTES.
    """

    name: str
    start: int
    offset: int
    size: int


def padded(size: int) -> int:
    """`size` rounded up to whole blocks, in bytes."""
    return -(-size // BLOCK) * BLOCK


def read_at(fd: int, offset: int, size: int) -> bytes:
    """All `size` bytes from `offset` on: one pread gives 2 GiB at most. OSError if the file ends before."""
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            raise OSError(errno.EIO, f"the file ends at byte {offset + len(data):,}, not {offset + size:,}")
        data += more
    return data


def compression(fd: int) -> str | None:
    """The compression of a file by its first bytes, whatever its name; None: none that is known."""
    start = os.pread(fd, 6, 0)
    return next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)


def scan(fd: int, start: int = 0, end: int | None = None, *, links: bool = False) -> Iterator[Member]:
    """Yields the regular files of an open tar in order, reading headers only.

    `end` (bytes) is the file's size unless given. With `links` it yields links and sparse files too. Raises
    BrokenTar where the tar stops being one; what was yielded before stands.
    """
    end = os.fstat(fd).st_size if end is None else end
    position, first = start, start
    window, low, ahead = b"", start, _FIRST_WINDOW
    records: dict[str, str] = {}
    while position < end:
        at = position - low
        if at + BLOCK > len(window):
            # headers close together are read together, far ones each alone
            ahead = _WINDOW if window and at < _WINDOW // 4 + len(window) else _FIRST_WINDOW
            window, low, at = os.pread(fd, ahead, position), position, 0
        block = window[at : at + BLOCK]
        if len(block) < BLOCK:
            raise BrokenTar(f"cut inside a header at byte {position}")
        if block == _ZEROS:
            _require_no_more(fd, position, end)
            return
        size, kind = _checked(block, position), block[156:157]
        body = position + BLOCK
        if kind in _REGULAR and records:
            size = int(records.get("size", size))
        if kind in _WITH_BYTES and body + size > end:
            raise BrokenTar(f"cut inside the member at byte {position}: {size} bytes announced")
        if kind in _REGULAR:
            name = records.get("path") or _name(block)
            # PAX's sparse files are regular ones by kind, with a map before the bytes or in the records
            if not (records and any(record.startswith("GNU.sparse.") for record in records)):
                yield Member(name, first, body, size)
            elif links:
                yield Member(records.get("GNU.sparse.name", name), first, body, NO_BYTES)
        elif kind in _LONG:
            records |= _long_header(fd, kind, body, size, position)
        elif kind in _SAMPLES_LOST:
            if links:
                yield Member(records.get("path") or _name(block), first, body, NO_BYTES)
            body += _sparse_headers(fd, block, body, end) if kind == b"S" else 0
        position = body + (0 if kind in _NO_BODY else -(-size // BLOCK) * BLOCK)
        if kind not in (*_LONG, b"K", b"g"):
            first = position
            if records:
                records = {}
    if end > start:
        raise BrokenTar(f"ends at byte {end} without the two zero blocks: cut between two members")


def header(name: str, size: int) -> bytes:
    """The header block(s) of a regular file, mode 0444, owner and time 0."""
    path = name.encode("utf-8", "surrogateescape")
    prefix, base = _split(path)
    if base is not None and size <= _LARGEST_OCTAL and path.isascii():
        return _block(base, size, b"0", prefix)
    records = [("path", path)]
    if size > _LARGEST_OCTAL:
        records.append(("size", str(size).encode()))
    body = b"".join(_record(key, value) for key, value in records)
    extended = _block(b"PaxHeader", len(body), b"x") + body + bytes(padded(len(body)) - len(body))
    plain = bytes(byte if byte < 128 else ord("?") for byte in path[-100:])
    return extended + _block(plain, min(size, _LARGEST_OCTAL), b"0")


def _require_no_more(fd: int, position: int, end: int) -> None:
    """Only zeros may follow the end: the samples of a second tar behind the first would be lost."""
    # a tar may end in as many zeros as its writer puts into one record
    for begin in range(position, end, _RECORD):
        if os.pread(fd, min(end - begin, _RECORD), begin).strip(b"\0"):
            raise BrokenTar(f"bytes follow the end of the tar at byte {position}: two tars concatenated?")


def _checked(block: bytes, position: int) -> int:
    """The size field of a header whose checksum holds."""
    try:
        # Adler-32's low half is 1 + the sum of all bytes modulo 65521: many times faster than sum()
        sums_match = zlib.adler32(block) & 0xFFFF == _expected(block[148:156]) or _signed_sums_match(block)
        size = _number(block[124:136])
    except ValueError:
        raise BrokenTar(f"no tar header at byte {position}") from None
    if size < 0 or not sums_match:
        raise BrokenTar(f"the header at byte {position} fails its checksum")
    return size


@lru_cache(maxsize=1 << 14)
def _expected(checksum: bytes) -> int:
    """Adler-32's low half of a header with this checksum field, which is itself summed as eight spaces."""
    return (_number(checksum) - 8 * 32 + sum(checksum) + 1) % 65521


def _signed_sums_match(block: bytes) -> bool:
    """Whether the checksum is one of signed bytes, as very old programs took it."""
    counted = block[:148] + b"        " + block[156:]
    total = sum(counted) - 256 * sum(byte > 127 for byte in counted)
    return total == _number(block[148:156])


def _number(field: bytes) -> int:
    if field[0] in (0x80, 0xFF):  # GNU's base 256 for files of 8 GiB and more
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    return int(field.strip(b" \0") or b"0", 8)


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _long_header(fd: int, kind: bytes, body: int, size: int, position: int) -> dict[str, str]:
    """What a PAX header or a GNU long name says of the member that follows it."""
    if size > _LONGEST_NAME:
        raise BrokenTar(f"the header at byte {position} announces a name of {size} bytes")
    data = os.pread(fd, size, body)
    if kind == b"x":
        return _pax(data, position)
    return {"path": data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}


def _sparse_headers(fd: int, block: bytes, body: int, end: int) -> int:
    """Bytes of the blocks that go on with the map of GNU's sparse file."""
    extra, more = 0, block[482]
    while more and body + extra < end:
        following = os.pread(fd, BLOCK, body + extra)
        extra, more = extra + BLOCK, following[504] if len(following) == BLOCK else 0
    return extra


def _pax(body: bytes, position: int) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a PAX header."""
    records, at = {}, 0
    while at < len(body) and body[at]:
        length, space, _ = body[at : at + 20].partition(b" ")
        if not space or not length.isdigit() or not len(length) + 1 < int(length) <= len(body) - at:
            raise BrokenTar(f"the PAX header at byte {position} is broken")
        key, _, value = body[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        if key == b"size" and not (value.isdigit() and len(value) < 20):
            raise BrokenTar(f"the PAX header at byte {position} is broken")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += int(length)
    return records


def _split(path: bytes) -> tuple[bytes, bytes | None]:
    """Prefix and base of a ustar name; the base is None where the name does not fit."""
    if len(path) <= 100:
        return b"", path
    at = path.rfind(b"/", 1, min(156, len(path) - 1))  # a prefix has 155 bytes at most
    fits = at > 0 and len(path) - at - 1 <= 100
    return (path[:at], path[at + 1 :]) if fits else (b"", None)


def _block(name: bytes, size: int, kind: bytes, prefix: bytes = b"") -> bytes:
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[100:108], block[108:116], block[116:124] = b"0000444\0", b"0000000\0", b"0000000\0"
    block[124:136], block[136:148] = b"%011o\0" % size, b"00000000000\0"
    block[148:156], block[156:157], block[257:265] = b"        ", kind, b"ustar\x0000"
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _record(key: str, value: bytes) -> bytes:
    """One PAX record, whose length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest + len(str(rest))))
    return f"{length} {key}=".encode() + value + b"\n"
