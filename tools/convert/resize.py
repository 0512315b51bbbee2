"""Images made smaller at conversion: the only place where one is encoded again."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps

from clipcluster.data.images.format import size_of

_LARGEST = 1 << 28  # pixels; more is taken for a decompression bomb


def resized(
    data: bytes, extension: str, side: int, *, mode: str = "keep_ratio", quality: int = 95
) -> tuple[bytes, str]:
    """The image with SIDE by `mode` (see `tools.convert.plan.Settings`), and its extension.

    Only what is larger is made smaller; the rest stays as it is, byte for byte. A smaller image is upright
    (EXIF applied), bicubic with antialias, and without metadata: PNG stays PNG and WebP stays WebP (quality
    `quality`), all else becomes JPEG of that quality with alpha put on white. ValueError: it cannot be
    decoded; the message says why.
    """
    known = size_of(data)
    if known is not None and _target(known, side, mode) == known:
        return data, extension
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images: the limit follows
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > _LARGEST:
                raise ValueError(f"{image.width} x {image.height} pixels: too large")
            upright = ImageOps.exif_transpose(image)
            return _encoded(upright, _target(upright.size, side, mode), extension, quality)
    except Exception as error:  # plug-ins raise SyntaxError, OSError, struct.error and more
        raise ValueError(f"cannot be decoded: {error}") from None


def _target(size: tuple[int, int], side: int, mode: str) -> tuple[int, int]:
    """Width and height (pixels) after resizing; `size` itself for what is small enough."""
    width, height = size
    if mode == "square":
        return (side, side) if width > side or height > side else size
    measured = max(size) if mode == "keep_ratio" else min(size)
    if measured <= side:
        return size
    # halves go up, in integers: the same on every machine
    return tuple(max(1, (2 * length * side + measured) // (2 * measured)) for length in size)  # type: ignore[return-value]


def _encoded(image: Image.Image, size: tuple[int, int], extension: str, quality: int) -> tuple[bytes, str]:
    alpha = "A" in image.getbands() or "transparency" in image.info
    grey = image.mode in ("1", "L", "LA")
    if image.mode.startswith("I"):  # 16 bits
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        alpha, grey = False, True
    image = image.convert("RGBA" if alpha else "L" if grey else "RGB").resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if extension == "png":
        image.save(file, "PNG")
        return file.getvalue(), "png"
    if extension == "webp":
        image.save(file, "WEBP", quality=quality)
        return file.getvalue(), "webp"
    if alpha:
        white = Image.new("RGB", size, "white")
        white.paste(image, mask=image.getchannel("A"))
        image = white
    image.save(file, "JPEG", quality=quality)
    return file.getvalue(), "jpg"
