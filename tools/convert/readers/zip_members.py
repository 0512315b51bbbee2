"""Members of a zip by name, without extracting it: its list is read once, its members by offset."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from clipcluster.errors import UserError
from tools.convert.readers.byte_ranges import ByteRanges

_LOCAL = struct.Struct("<4s22xHH")  # signature, …, lengths of name and extra field
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1


class DamagedMember(Exception):
    """A member that is not what the zip's list says of it."""


class ZipMembers:
    """The files in a zip. It may be pickled and read from any process; a zip in a zip is only bytes."""

    def __init__(self, path: Path) -> None:
        """Reads the list. UserError for a file that is no whole zip, or one that is encrypted."""
        self.path = path
        self._file = ByteRanges(path)
        self._members: dict[str, zipfile.ZipInfo] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                found = [info for info in archive.infolist() if not info.is_dir()]
        except zipfile.BadZipFile as error:
            raise UserError(
                f"{path} is not a complete zip ({error}), as after an interrupted download: download it again"
            ) from None
        for info in found:
            if info.flag_bits & _ENCRYPTED or info.compress_type not in _METHODS:
                raise UserError(
                    f"{path}: {info.filename} is encrypted or packed by method {info.compress_type}; only "
                    "stored and deflated members can be read: extract it and give the folder"
                )
            self._members[info.filename] = info

    def __iter__(self) -> Iterator[str]:
        """The names, in the zip's order."""
        return iter(self._members)

    def size(self, name: str) -> int:
        """Bytes of a member, unpacked. KeyError: no such member."""
        return self._members[name].file_size

    def read(self, name: str) -> bytes:
        """A member's bytes. KeyError: no such member; DamagedMember; OSError where the disk fails."""
        member = self._members[name]
        signature, name_bytes, extra = _LOCAL.unpack(self._file.read(member.header_offset, _LOCAL.size))
        if signature != b"PK\x03\x04":
            raise DamagedMember(f"no member begins at byte {member.header_offset:,} of {self.path.name}")
        data = self._file.read(member.header_offset + _LOCAL.size + name_bytes + extra, member.compress_size)
        if member.compress_type == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompress(data, -zlib.MAX_WBITS)
            except zlib.error as error:
                raise DamagedMember(f"cannot be unpacked from {self.path.name}: {error}") from None
        if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
            raise DamagedMember(f"not what the checksum in {self.path.name} says")
        return data
