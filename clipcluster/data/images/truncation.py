"""Detecting truncated JPEGs by their markers, without decoding (ITU-T T.81, annex B). Imports no torch.

Where the end marker comes too early, decoders fill the rest with grey and only warn. It is detected from
outside: bytes inserted before the end marker change the picture only if its pixels were not complete.
"""

import hashlib
import struct

MOST_SCANS = 500  # each costs a pass over the picture; encoders write about ten
_NO_FRAME = (0xC4, 0xC8, 0xCC)  # markers between C0 and CF that begin no frame
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_ALL_COEFFICIENTS = (1 << 64) - 1
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_NOISE = hashlib.shake_128(b"").digest(4096).replace(b"\xff", b"\0")  # no markers in it


class BrokenMarkers(Exception):
    """The markers are not those of an image; the message says what is wrong."""


def frame_at(data: bytes) -> int | None:
    """The offset of the frame header's marker; None if pixels or the end come first."""
    at = 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xFF:
            at += 1  # decoders skip bytes between segments, and fill bytes
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            return at
        elif marker in (0xD9, 0xDA):
            return None
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def doubtful(data: bytes) -> bool:
    """Whether pixels may be missing without grey ones: four colours, or an incomplete set of scans.

    Raises BrokenMarkers for a file without a frame or with more than `MOST_SCANS` scans.
    """
    frame = frame_at(data)
    if frame is None or frame + 10 > len(data):
        raise BrokenMarkers("no frame header")
    components = data[frame + 9]
    if frame + 10 + 3 * components > len(data):
        raise BrokenMarkers("truncated: the frame header is not whole")
    first = data.find(_SCAN, frame)
    if first < 0 or first + 10 > len(data):
        raise BrokenMarkers("truncated: no pixels")
    if data[frame + 1] not in _PROGRESSIVE and data[first + 4] == components:
        return components == 4
    ids = {data[frame + 10 + 3 * number] for number in range(components)}
    return _lacks_scans(data, first, ids, progressive=data[frame + 1] in _PROGRESSIVE)


def _lacks_scans(data: bytes, at: int, components: set[int], *, progressive: bool) -> bool:
    """Whether no scan has the last bit of some coefficient of a component."""
    given = dict.fromkeys(components, 0)
    scans = 0
    while at >= 0:
        scans += 1
        if scans > MOST_SCANS:
            raise BrokenMarkers(f"more than {MOST_SCANS} scans")
        count = data[at + 4] if at + 4 < len(data) else 0
        header = data[at + 5 : at + 8 + 2 * count]  # component and table of each, then first, last, bits
        if len(header) == 3 + 2 * count:
            begin, end, bits = header[-3:] if progressive else (0, 63, 0)
            if bits & 15 == 0:
                for component in header[: 2 * count : 2]:
                    given[component] = given.get(component, 0) | (2 << end) - (1 << begin)
        at = data.find(_SCAN, at + 2)
    return any(given[component] & _ALL_COEFFICIENTS != _ALL_COEFFICIENTS for component in components)


def continued(data: bytes) -> bytes:
    """The same JPEG with noise between the last scan and the end marker."""
    end = data.find(_END, data.rfind(_SCAN))
    if end < 0:
        raise BrokenMarkers("truncated: no end marker")
    return data[:end].rstrip(b"\xff") + _NOISE + _END
