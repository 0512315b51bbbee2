"""The kind and size of an image by its bytes. Imports no torch, and Pillow only where it is needed."""

import io
import struct
import warnings

from clipcluster.data.images import truncation as jpeg

# Our name of a kind, its usual extension, and Pillow's name for it (None: Pillow cannot read it).
_KINDS: dict[str, tuple[str, str | None]] = {
    "JPEG": ("jpg", "JPEG"),
    "PNG": ("png", "PNG"),
    "GIF": ("gif", "GIF"),
    "WebP": ("webp", "WEBP"),
    "BMP": ("bmp", "BMP"),
    "TIFF": ("tif", "TIFF"),
    "AVIF": ("avif", "AVIF"),
    "HEIF": ("heic", None),
    "JPEG 2000": ("jp2", "JPEG2000"),
    "JPEG XL": ("jxl", None),
    "PPM": ("ppm", "PPM"),
}
KIND_NAMES = tuple(_KINDS)
_BEGINNINGS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
)
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # bytes of the header that follows the first 14
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def kind_of(data: bytes) -> str | None:
    """JPEG, PNG, GIF, WebP, BMP, TIFF, AVIF, HEIF, JPEG 2000, JPEG XL or PPM; None: no known kind of image.

    The first 64 bytes are enough.
    """
    for beginning, kind in _BEGINNINGS:
        if data.startswith(beginning):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp":
        return _kind_of_boxes(data)
    if data[:2] == b"BM" and len(data) >= 18 and struct.unpack_from("<I", data, 14)[0] in _BMP_HEADERS:
        return "BMP"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3] in b" \t\r\n#" and len(data) > 3:
        return "PPM"
    return None


def _kind_of_boxes(data: bytes) -> str | None:
    """AVIF and HEIF share a container; the brands at its beginning tell them apart."""
    end = min(max(struct.unpack_from(">I", data)[0], 16), 64)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    return "HEIF" if brands & _HEIF_BRANDS else None


def extension_of(data: bytes) -> str | None:
    """The usual extension of the image's kind, without a dot (`jpg`, `png`, …); None: no known kind."""
    kind = kind_of(data)
    return None if kind is None else _KINDS[kind][0]


def pillow_name(kind: str) -> str | None:
    """What Pillow calls the kind; None where Pillow alone cannot read it."""
    return _KINDS[kind][1]


def no_image(data: bytes) -> str:
    """Why bytes are no image of a known kind, in a few words."""
    if not data:
        return "empty file"
    if data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "HTML or XML, no image"
    return f"no known kind of image (begins {data[:8]!r})"


def size_of(data: bytes) -> tuple[int, int] | None:
    """Width and height (pixels) by the header, before any rotation by EXIF; None where it has none.

    Nothing is decoded. The size of a damaged file may be wrong; a size of zero counts as none.
    """
    kind = kind_of(data)
    try:
        size = _SIZES[kind](data) if kind in _SIZES else _size_by_pillow(data, kind)
    except (struct.error, IndexError):
        return None
    return size if size and min(size) > 0 else None


def _jpeg(data: bytes) -> tuple[int, int] | None:
    at = jpeg.frame_at(data)
    if at is None:
        return None
    height, width = struct.unpack_from(">HH", data, at + 5)
    return width, height


def _webp(data: bytes) -> tuple[int, int] | None:
    chunk = data[12:16]
    if chunk == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L" and data[20:21] == b"\x2f":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return None


_SIZES = {
    "JPEG": _jpeg,
    "WebP": _webp,
}  # the kinds whose size the loader needs of every image; Pillow reads the others


def _size_by_pillow(data: bytes, kind: str | None) -> tuple[int, int] | None:
    name = None if kind is None else pillow_name(kind)
    if name is None:
        return None
    from PIL import Image

    Image.init()
    if name not in Image.OPEN:  # a Pillow without this decoder
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged headers
            # The plug-in itself: Image.open refuses large images before their size can be asked.
            with Image.OPEN[name][0](io.BytesIO(data), "") as image:
                return image.size
    except Exception:  # plug-ins raise SyntaxError, OSError, struct.error and more at damaged headers
        return None
