"""scikit-learn's handwritten digits as shards: 1,797 real scans of 8 x 8 pixels, ten classes.

The data: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository
(1998), the part that scikit-learn ships. Held out are 36 scans of each digit, 360 in all: those whose hashed
number is smallest, so that the split depends on no library's random numbers.
"""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from clipcluster.data.index import IndexSummary
from tools.shard_writer import ShardWriter

CLASSNAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a scan of the handwritten digit {c}",
    "the digit {c}, written by hand",
    "a small grey picture of the number {c}",
    "somebody wrote the number {c}",
    "the handwritten numeral {c}",
)
HELD_OUT = 36  # of each digit
SPLITS = ("train", "test")
_SAMPLES_PER_SHARD = 256


def write_digits(folder: Path) -> dict[str, IndexSummary]:
    """Writes `train` (1,437 samples) and `test` (360) below a folder, with class names and templates."""
    summaries = {}
    for split in SPLITS:
        with ShardWriter(folder / split, samples_per_shard=_SAMPLES_PER_SHARD) as writer:
            for number, digit, scan in _digits(split):
                texts = [template.format(c=CLASSNAMES[digit]) for template in TEMPLATES]
                fields = {"id": number}
                writer.add(f"digit-{number:04d}", png(scan), "png", texts, fields=fields, cls=digit)
        summaries[split] = writer.finish()
        (folder / split / "classnames.txt").write_text("\n".join(CLASSNAMES) + "\n", encoding="utf-8")
        templates = folder / split / "zeroshot_classification_templates.txt"
        templates.write_text("\n".join(TEMPLATES) + "\n", encoding="utf-8")
    return summaries


def png(scan: np.ndarray) -> bytes:
    """An (8, 8) scan of values 0 to 16 as a grey PNG, 0 to 255; stored, so that no zlib changes the bytes."""
    pixels = np.rint(scan * 255 / 16).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


def _digits(split: str) -> Iterator[tuple[int, int, np.ndarray]]:
    """Number, digit and (8, 8) scan of every sample of a split, by number."""
    from sklearn.datasets import load_digits

    data = load_digits()
    digits = [int(digit) for digit in data.target]
    held_out: set[int] = set()
    for digit in range(10):
        numbers = [number for number, other in enumerate(digits) if other == digit]
        held_out |= set(sorted(numbers, key=_rank)[:HELD_OUT])
    for number, digit in enumerate(digits):
        if (number in held_out) == (split == "test"):
            yield number, digit, data.images[number]


def _rank(number: int) -> bytes:
    return hashlib.sha256(f"digit {number}".encode()).digest()
