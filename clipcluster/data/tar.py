"""Tar files as bytes: where every member begins, and headers of our own.

Reads POSIX ustar, PAX (path and size records) and GNU (long names, base-256 sizes), by header alone.
Writes ustar, with a PAX header only where ustar cannot say it; the same member gives the same bytes.
"""

import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
END = bytes(2 * BLOCK)

_REGULAR = (b"0", b"\0", b"7")
_LARGEST_OCTAL = 8**11 - 1


class BrokenTar(Exception):
    """The bytes are no whole tar from here on: the message says where and why."""


class Member(NamedTuple):
    """One regular file: `start` of its first header, `offset` and `size` of its bytes (all in bytes)."""

    name: str
    start: int
    offset: int
    size: int


def padded(size: int) -> int:
    """`size` rounded up to whole blocks, in bytes."""
    return -(-size // BLOCK) * BLOCK


def scan(fd: int, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Yields the regular files of an open tar in order, reading headers only.

    `end` (bytes) is the file's size unless given. Raises BrokenTar where the tar stops being one; what was
    yielded before stands.
    """
    end = os.fstat(fd).st_size if end is None else end
    position, first = start, start
    records: dict[str, str] = {}
    while position < end:
        header = os.pread(fd, BLOCK, position)
        if len(header) < BLOCK:
            raise BrokenTar(f"cut inside a header at byte {position}")
        if header[0] == 0 and not any(header):
            return
        size, kind = _checked(header, position), header[156:157]
        body = position + BLOCK
        if kind in (b"x", b"L") or kind in _REGULAR:
            size = int(records.get("size", size)) if kind in _REGULAR else size
            if body + size > end:
                raise BrokenTar(f"cut inside the member at byte {position}: {size} bytes announced")
        if kind == b"x":
            records |= _pax(os.pread(fd, size, body), position)
        elif kind == b"L":
            records["path"] = os.pread(fd, size, body).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind in _REGULAR:
            yield Member(records.get("path") or _name(header), first, body, size)
        position = body + padded(size)
        if kind not in (b"x", b"L", b"K", b"g"):
            records, first = {}, position
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


def _checked(block: bytes, position: int) -> int:
    """The size field of a header whose checksum holds."""
    try:
        stored = int(block[148:156].strip(b" \0") or b"0", 8)
        size = _number(block[124:136])
    except ValueError:
        raise BrokenTar(f"no tar header at byte {position}") from None
    # Adler-32's low half is 1 + the sum of all bytes modulo 65521: the checksum, many times faster than sum()
    total = zlib.adler32(block[:148] + b"        " + block[156:]) & 0xFFFF
    if size < 0 or total != (stored + 1) % 65521:
        raise BrokenTar(f"the header at byte {position} fails its checksum")
    return size


def _number(field: bytes) -> int:
    if field[0] in (0x80, 0xFF):  # GNU's base 256 for files of 8 GiB and more
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    return int(field.strip(b" \0") or b"0", 8)


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _pax(body: bytes, position: int) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a PAX header."""
    records, at = {}, 0
    while at < len(body) and body[at]:
        length, _, _ = body[at:].partition(b" ")
        if not length.isdigit() or int(length) <= len(length) + 1:
            raise BrokenTar(f"the PAX header at byte {position} is broken")
        key, _, value = body[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        if key == b"size" and not value.isdigit():
            raise BrokenTar(f"the PAX header at byte {position} is broken")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += int(length)
    return records


def _split(path: bytes) -> tuple[bytes, bytes | None]:
    """Prefix and base of a ustar name; the base is None where the name does not fit."""
    if len(path) <= 100:
        return b"", path
    for at in range(len(path) - 1, 0, -1):
        if path[at : at + 1] == b"/" and at <= 155 and 0 < len(path) - at - 1 <= 100:
            return path[:at], path[at + 1 :]
    return b"", None


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
    length = rest + len(str(rest))
    while length != rest + len(str(length)):
        length = rest + len(str(length))
    return f"{length} {key}=".encode() + value + b"\n"
