"""Decoding image bytes to pixels. The kind is decided by content, never by a file's name.

JPEG and still WebP go to torchvision, whose decoders are the fastest and safe on damaged files; everything
else goes to Pillow: torchvision's PNG decoder crashes on damaged files and decodes palettes and transparent
colours wrongly, its GIF decoder unpacks every frame, and it has no decoder for the other kinds.
"""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg, decode_webp

from clipcluster.data.images import truncation as jpeg
from clipcluster.data.images.format import kind_of, no_image, pillow_name, size_of
from clipcluster.runtime.outcome import is_out_of_memory

LARGEST = 89_478_485  # pixels; Pillow's limit: 256 MiB of RGB
_ANIMATION, _EXIF = 0x02, 0x08  # flags of a WebP's header
_GREY = 128  # what a JPEG decoder fills in where the data end early

Image.init()  # load all of Pillow's decoders, not only the usual ones
if "AVIF" in Image.OPEN:
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the loader's workers are the parallel part


class BadImage(Exception):
    """The bytes cannot be decoded; the message is the reason, in a few words."""


def decode(data: bytes, *, turned: bool = True) -> torch.Tensor:
    """Decode an image to (3, H, W) uint8.

    Grey becomes three equal channels, alpha is put on white, 16 bits become 8, of several frames the first
    is taken (the others are not read), and EXIF orientation is applied if `turned`.

    Raises BadImage for all else: truncated files, and images whose header declares more than `LARGEST`
    pixels. Raises MemoryError where this machine lacks the memory for the pixels, which is no fault of the
    image.
    """
    kind = kind_of(data)
    if kind is None:
        raise BadImage(no_image(data))
    try:
        if kind in ("JPEG", "WebP"):  # of the others Pillow reads the size
            _refuse_too_large(size_of(data), kind)
        if kind == "JPEG":
            return _jpeg(data, turned)
        if _is_plain_webp(data, kind):
            return _rgb(decode_webp(_writable(data), ImageReadMode.UNCHANGED))
        return _rgb(_pillow(data, kind, turned))
    except BadImage:
        raise
    except Exception as error:  # decoders raise RuntimeError, OSError, SyntaxError, struct.error and more
        if is_out_of_memory(error) and _memory_is_short():
            raise MemoryError(str(error)) from error
        raise BadImage(_reason(kind, error)) from None


def _memory_is_short() -> bool:
    """Whether memory for the largest image is lacking: a damaged image may ask for any number of bytes."""
    try:
        bytearray(3 * LARGEST)
    except MemoryError:
        return True
    return False


def _refuse_too_large(size: tuple[int, int] | None, kind: str) -> None:
    if size is None:
        raise BadImage(f"{kind}: damaged header")
    if size[0] * size[1] > LARGEST:
        raise BadImage(f"{kind}: {size[0]} x {size[1]} pixels are too many (at most {LARGEST:,})")


def _jpeg(data: bytes, turned: bool) -> torch.Tensor:
    doubtful = jpeg.doubtful(data)
    pixels = decode_jpeg(_writable(data), ImageReadMode.RGB, apply_exif_orientation=turned)
    if (doubtful or _has_grey_corner(pixels)) and _plain(data) != _plain(jpeg.continued(data)):
        raise BadImage("truncated JPEG: the end marker comes before the last pixels")
    return pixels


def _has_grey_corner(pixels: torch.Tensor) -> bool:
    """Whether any corner is grey: depending on the orientation each may be the last pixel of the file."""
    _, height, width = pixels.shape
    corners = pixels[0, :: max(1, height - 1), :: max(1, width - 1)].tolist()  # red alone settles it for most
    return any(_GREY in row for row in corners)


def _plain(data: bytes) -> bytes:
    """The pixels of a JPEG, decoded by Pillow, which writes no warnings to stderr."""
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        return image.tobytes()


def _is_plain_webp(data: bytes, kind: str) -> bool:
    """Whether this is a WebP without animation and EXIF orientation."""
    return kind == "WebP" and not (data[12:16] == b"VP8X" and data[20] & (_ANIMATION | _EXIF))


def _writable(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # torch warns about read-only memory


def _pillow(data: bytes, kind: str, turned: bool) -> torch.Tensor:
    name = pillow_name(kind)
    if name is None or name not in Image.OPEN:
        raise BadImage(f"{kind}: no decoder for this kind is installed")
    if kind == "PNG" and b"IEND" not in data:
        raise BadImage("truncated PNG: no end chunk")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd tags
        with Image.open(io.BytesIO(data), formats=[name]) as image:
            _refuse_too_large(image.size, kind)
            image.load()
            if turned:
                ImageOps.exif_transpose(image, in_place=True)
            return _array(image)


def from_pillow(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8 of an image open in Pillow, by the rules of `decode`. Raises BadImage as `decode`."""
    try:
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format  # a copy has none, and `_array` recognises 16 bits by it
        return _rgb(_array(upright))
    except BadImage:
        raise
    except Exception as error:  # Pillow decodes when the pixels are first used
        raise BadImage(_reason(image.format or "image", error)) from None


def _array(image: Image.Image) -> torch.Tensor:
    """(1, 3 or 4, H, W) uint8; values of 16 bits are scaled so that 65,535 becomes 255, and rounded."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # in older Pillows
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return torch.from_numpy(((grey * 255 + 32767) // 65535).astype(np.uint8))[None]
    if image.mode in ("I", "F"):
        raise BadImage(f"pixels of kind {image.mode} have no range")
    alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    array = np.array(image.convert("RGBA" if alpha else "RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)


def _rgb(pixels: torch.Tensor) -> torch.Tensor:
    """One to four channels to three; the second of two and the fourth of four are alpha."""
    if pixels.shape[0] in (2, 4):
        colour, alpha = pixels[:-1].to(torch.int32), pixels[-1:].to(torch.int32)
        pixels = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)
    return pixels.expand(3, -1, -1) if pixels.shape[0] == 1 else pixels


def _reason(kind: str, error: Exception) -> str:
    """A decoder's message, without its file names and addresses."""
    if isinstance(error, UnidentifiedImageError):
        return f"{kind}: damaged header"
    if isinstance(error, Image.DecompressionBombError):
        return f"{kind}: too many pixels (at most {LARGEST:,})"
    text = " ".join(str(error).split()) or type(error).__name__
    if ".cpp" in text:
        text = text.rpartition(": ")[2].rpartition(".cpp")[2].partition(", ")[2] or text.rpartition(", ")[2]
    return f"{kind}: {text}"[:200]
