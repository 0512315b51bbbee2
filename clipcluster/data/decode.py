"""Image bytes to pixels. The kind is decided by content, never by a file's name."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image

_PILLOW_KINDS = ("BMP", "TIFF", "AVIF", "PPM", "JPEG2000")  # what torchvision refuses and people have


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
        pixels = _torchvision(data) if _kind(data) in _TORCHVISION_MODES else _pillow(data)
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


_TORCHVISION_MODES = {
    "JPEG": ImageReadMode.RGB,
    "PNG": ImageReadMode.RGB_ALPHA,
    "GIF": ImageReadMode.RGB,
    "WebP": ImageReadMode.UNCHANGED,
}


def _torchvision(data: bytes) -> torch.Tensor:
    kind = _kind(data)
    mode = _TORCHVISION_MODES[kind]
    if kind == "PNG":
        if b"IEND" not in data[-4096:] and b"IEND" not in data:
            raise BadImage("truncated PNG: no end chunk")
        if data[25:26] in (b"\0", b"\2") and data.find(b"tRNS", 0, data.find(b"IDAT")) < 0:
            mode = ImageReadMode.RGB
    # bytearray: torch wants memory it may write to
    pixels = decode_image(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), mode, apply_exif_orientation=True
    )
    return pixels[0] if pixels.ndim == 4 else pixels


def _pillow(data: bytes) -> torch.Tensor:
    kinds = None if _kind(data) == "animated WebP" else [name for name in _PILLOW_KINDS if _readable(name)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=["WEBP"] if kinds is None else kinds) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        return torch.from_numpy(np.asarray(upright).astype(np.uint16))[None]
    if upright.mode in ("I", "F"):
        raise BadImage(f"pixels of kind {upright.mode} have no range")
    alpha = upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info
    array = np.array(upright.convert("RGBA" if alpha else "RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)


def _readable(kind: str) -> bool:
    Image.init()
    return kind in Image.OPEN


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
