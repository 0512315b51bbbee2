"""Image bytes to pixels. The kind is decided by content, never by a file's name."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image

_TORCHVISION = {"JPEG": ImageReadMode.RGB, "GIF": ImageReadMode.RGB, "WebP": ImageReadMode.UNCHANGED}
# Pillow reads what torchvision refuses, and PNG: there torchvision crashes on damaged files and, asked for
# alpha, gets palettes and transparent colours wrong.
_PILLOW = {"PNG": ["PNG"], "animated WebP": ["WEBP"], "other": ["BMP", "TIFF", "AVIF", "PPM", "JPEG2000"]}
_LARGEST = 2**27  # pixels of an image that Pillow may unpack

Image.init()  # all kinds of this installation, not only the usual ones


class BadImage(Exception):
    """The bytes cannot be decoded; the message is the reason, in a few words."""


def decode(data: bytes) -> torch.Tensor:
    """Decodes an image to (3, H, W) uint8.

    Grey becomes three equal channels, alpha is put on white, 16 bits become 8, of several frames the first
    is taken, EXIF orientation is applied. BadImage for everything else, truncated files among it.
    """
    if not data:
        raise BadImage("empty file")
    try:
        kind = _kind(data)
        if kind == "PNG" and b"IEND" not in data[-4096:]:
            raise BadImage("truncated PNG: no end chunk")
        pixels = (
            _torchvision(data, _TORCHVISION[kind]) if kind in _TORCHVISION else _pillow(data, _PILLOW[kind])
        )
    except BadImage:
        raise
    except Exception as error:  # decoders raise RuntimeError, OSError, SyntaxError, struct.error and more
        raise BadImage(_reason(data, error)) from None
    return _rgb(_eight_bits(pixels))


def _kind(data: bytes) -> str:
    """JPEG, PNG, GIF, WebP by their first bytes; an animated WebP and everything else is `other`."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "animated WebP" if b"ANIM" in data[12:64] else "WebP"
    return "other"


def _torchvision(data: bytes, mode: ImageReadMode) -> torch.Tensor:
    # bytearray: torch wants memory it may write to
    pixels = decode_image(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), mode, apply_exif_orientation=True
    )
    return pixels[0] if pixels.ndim == 4 else pixels


def _pillow(data: bytes, kinds: Sequence[str]) -> torch.Tensor:
    with Image.open(io.BytesIO(data), formats=[kind for kind in kinds if kind in Image.OPEN]) as image:
        if image.width * image.height > _LARGEST:
            raise BadImage(f"{image.width} x {image.height} pixels are too many")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _array(image)


def _array(image: Image.Image) -> torch.Tensor:
    """(1, H, W) uint16, or (3 or 4, H, W) uint8."""
    if image.mode.startswith("I;16"):
        return torch.from_numpy(np.asarray(image).astype(np.uint16))[None]
    if image.mode in ("I", "F"):
        raise BadImage(f"pixels of kind {image.mode} have no range")
    alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    array = np.array(image.convert("RGBA" if alpha else "RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)


def _eight_bits(pixels: torch.Tensor) -> torch.Tensor:
    """uint16 to uint8, rounded: 65,535 becomes 255."""
    if pixels.dtype != torch.uint16:
        return pixels
    return ((pixels.to(torch.int64) * 255 + 32767) // 65535).to(torch.uint8)


def _rgb(pixels: torch.Tensor) -> torch.Tensor:
    """One to four channels to three; the second of two and the fourth of four are alpha."""
    if pixels.shape[0] in (2, 4):
        colour, alpha = pixels[:-1].to(torch.int32), pixels[-1:].to(torch.int32)
        pixels = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)
    return pixels.expand(3, -1, -1) if pixels.shape[0] == 1 else pixels


def _reason(data: bytes, error: Exception) -> str:
    text = " ".join(str(error).split())
    if _kind(data) == "other":
        begin = data[:12].lstrip()
        return (
            "HTML or XML, no image"
            if begin.startswith(b"<")
            else f"no known kind of image (begins {data[:8]!r})"
        )
    text = text.rpartition(": ")[2] if ".cpp:" in text else text
    return f"{_kind(data)}: {text.rpartition(', ')[2] if '.cpp' in text else text}"[:200]
