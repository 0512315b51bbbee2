"""Damages images of one kind for some seconds and decodes them: damage_images.py KIND SECONDS [SEED].

Prints how many were tried and how many still decoded. What crashes stays in `damaged.KIND` of the folder for
temporary files.
"""

import io
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from clipcluster.data.images.decode import BadImage, decode


def seeds(kind: str) -> Iterator[bytes]:
    """Whole images: plain, turned, grey, with alpha, of several frames, as far as the kind has them."""
    numbers = np.random.default_rng(0)
    image = Image.fromarray(numbers.integers(0, 256, (40, 48, 3), dtype=np.uint8)).resize((60, 50))
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = image.copy()
    clear.putalpha(128)
    for picture in (image, image.convert("L"), clear, image.convert("P"), image.convert("CMYK")):
        for options in (
            {}, {"progressive": True, "exif": exif}, {"lossless": True}, {"compression": "tiff_lzw"},
            {"save_all": True, "append_images": [image.rotate(9).convert(picture.mode)]},
        ):  # fmt: skip
            file = io.BytesIO()
            try:
                picture.save(file, kind, **options)
            except (OSError, ValueError, KeyError):  # the kind has no such mode
                continue
            yield file.getvalue()


def damaged(data: bytes, numbers: np.random.Generator) -> bytes:
    """Bits flipped, bytes overwritten, taken out and put in, half of them near the beginning."""
    out = bytearray(data)
    for _ in range(numbers.integers(1, 6)):
        at = int(numbers.integers(min(len(out), 120 if numbers.integers(2) else len(out))))
        few = int(numbers.integers(1, 20))
        match numbers.integers(5):
            case 0 | 1:
                out[at] ^= 1 << int(numbers.integers(8))
            case 2:
                out[at] = int(numbers.integers(256))
            case 3 if len(out) > 200:
                del out[at : at + few]
            case _:
                out[at:at] = numbers.integers(0, 256, few, dtype=np.uint8).tobytes()
    return bytes(out)


def main(kind: str, seconds: float, seed: int = 1) -> None:
    numbers = np.random.default_rng(seed)
    whole = list(dict.fromkeys(seeds(kind)))
    last = Path(tempfile.gettempdir()) / f"damaged.{kind}"
    tried = decoded = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = damaged(whole[numbers.integers(len(whole))], numbers)
        last.write_bytes(data)
        tried += 1
        try:
            decode(data)
            decoded += 1
        except BadImage:
            pass
    last.unlink()
    print(tried, decoded)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *map(int, sys.argv[3:]))
