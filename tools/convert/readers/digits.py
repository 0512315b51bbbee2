"""scikit-learn's handwritten digits as shards: 1,797 real scans of 8 x 8 pixels, ten classes.

The data: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository
(1998), the part that scikit-learn ships. Held out are 36 scans of each digit, 360 in all: those whose hashed
number is smallest, so that the split depends on no library's random numbers.
"""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clipcluster.errors import UserError
from tools.convert.records import Kind, NoOptions, Record, Source

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


class _Digits:
    """A split, by the scans' numbers."""

    def __init__(self, name: str, numbers: Sequence[int], targets: np.ndarray, scans: np.ndarray) -> None:
        self.name = name
        self.files = {
            "classnames.txt": "\n".join(CLASSNAMES) + "\n",
            "zeroshot_classification_templates.txt": "\n".join(TEMPLATES) + "\n",
        }
        self._numbers, self._targets, self._scans = numbers, targets, scans

    def __len__(self) -> int:
        return len(self._numbers)

    def sizes(self) -> np.ndarray:
        return np.full(len(self), len(png(self._scans[0])), np.int64)

    def read(self, number: int) -> Record:
        scan = self._numbers[number]
        digit = int(self._targets[scan])
        texts = [template.format(c=CLASSNAMES[digit]) for template in TEMPLATES]
        return Record(f"digit-{scan:04d}", png(self._scans[scan]), texts, {"id": scan}, digit)


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
    parts = {
        split: [number for number in range(len(data.target)) if (number in held_out) == (split == "test")]
        for split in SPLITS
    }
    return Source([_Digits(split, parts[split], data.target, data.images) for split in SPLITS], [])


def _rank(number: int) -> bytes:
    return hashlib.sha256(f"digit {number}".encode()).digest()


KIND = Kind("scikit-learn's handwritten digits (the demo).", _open, samples_per_shard=256)
