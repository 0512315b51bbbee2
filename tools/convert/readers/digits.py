"""scikit-learn's handwritten digits as shards: 1,797 real scans of 8 x 8 pixels, ten classes.

The data: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository
(1998), the part that scikit-learn ships. Held out are 36 scans of each digit, 360 in all: those whose hashed
number is smallest, so that the split depends on no library's random numbers.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clipcluster.data.shards.captions import CLASS_NAMES
from clipcluster.data.shards.captions import TEMPLATES as PROMPTS
from clipcluster.errors import UserError
from tools.convert.records import Kind, NoOptions, Record, Source, Split

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


def png(scan: np.ndarray) -> bytes:
    """An (8, 8) scan of values 0 to 16 as a grey PNG, 0 to 255; stored, so that no zlib changes the bytes."""
    pixels = np.rint(scan * 255 / 16).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


def _open(inputs: Sequence[Path], options: NoOptions) -> Source:
    """`train` (1,437 samples) and `test` (360)."""
    if inputs:
        raise UserError(f"convert digits: {inputs[0]} was given; the digits come with scikit-learn, no INPUT")
    from sklearn.datasets import load_digits

    data = load_digits()
    held_out: set[int] = set()
    for digit in range(10):
        numbers = np.flatnonzero(data.target == digit).tolist()
        held_out |= set(sorted(numbers, key=_rank)[:HELD_OUT])
    records: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for number, (scan, digit) in enumerate(zip(data.images, data.target.tolist(), strict=True)):
        texts = [template.format(c=CLASSNAMES[digit]) for template in TEMPLATES]
        record = Record(f"digit-{number:04d}", png(scan), texts, {"id": number}, digit)
        records["test" if number in held_out else "train"].append(record)
    files = {CLASS_NAMES: "\n".join(CLASSNAMES) + "\n", PROMPTS: "\n".join(TEMPLATES) + "\n"}
    return Source([_split(name, found, files) for name, found in records.items()], [])


def _split(name: str, records: Sequence[Record], files: Mapping[str, str]) -> Split:
    sizes = np.array([len(record.image) for record in records])
    return Split(name, len(records), lambda: sizes, records.__getitem__, files)


def _rank(number: int) -> bytes:
    return hashlib.sha256(f"digit {number}".encode()).digest()


KIND = Kind("scikit-learn's handwritten digits (the demo).", _open, samples_per_shard=256)
