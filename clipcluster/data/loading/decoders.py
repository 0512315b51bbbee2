"""Decoders of extras (`extras.py`): from a member's bytes to its value."""

from __future__ import annotations

import gzip
import io
import json
import math
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from clipcluster.data.images.reinforcement import StoredAugmentation

_GZIP, _ZIP = b"\x1f\x8b", b"PK"
LARGEST = 1 << 26
"""Upper bound of the bytes of a sample's arrays, about a hundred times those of DataCompDR."""


def arrays(data: bytes) -> dict[str, Tensor]:
    """Named arrays: NumPy's `npz`, or a dictionary of tensors that torch saved, compressed by gzip or not.

    Nothing is unpickled but tensors. ValueError where it unpacks to more than `LARGEST`.
    """
    if data.startswith(_GZIP):
        with gzip.open(io.BytesIO(data)) as packed:
            data = packed.read(LARGEST + 1)
        _check_size(len(data))
    elif data.startswith(_ZIP) and b".npy" in data[:512]:  # torch's own files are zip archives, too
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            _check_size(sum(_declared(stored.zip.open(name)) for name in stored.zip.namelist()))
            return {name: torch.from_numpy(stored[name]) for name in stored.files}
    if data.startswith(_ZIP):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_size(sum(file.file_size for file in archive.infolist()))
    found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError("no dictionary of tensors")
    _check_size(sum(value.nbytes for value in found.values()))  # expanded tensors count in full
    return found


def _declared(file: IO[bytes]) -> int:
    """The bytes of an array by its header; NumPy allocates them before it reads any."""
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = header(file)
    return math.prod(shape) * kind.itemsize


def _check_size(size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"unpacks to more than {LARGEST:,} bytes")


def record(data: bytes) -> Mapping[str, Any]:
    """A JSON object."""
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def augmentations(data: bytes) -> list[StoredAugmentation]:
    """`param_aug` of a DataCompDR sample: a list, or the same as text."""
    written = record(data)["param_aug"]
    found = json.loads(written) if isinstance(written, str) else written
    if not isinstance(found, list) or not found:
        raise ValueError("param_aug is no list of augmentations")
    return [StoredAugmentation.of(entry) for entry in found]
