"""Decoders of further members of a sample (`extras.py`): a member's bytes to values."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipcluster.data.images.reinforcement import StoredAugmentation

_GZIP = b"\x1f\x8b"


def arrays(data: bytes) -> dict[str, Tensor]:
    """Named arrays: NumPy's `npz`, or a dictionary of tensors that torch saved, compressed by gzip or not.

    Nothing is unpickled but tensors.
    """
    if data.startswith(_GZIP):
        data = gzip.decompress(data)
    elif data.startswith(b"PK") and b".npy" in data[:512]:  # torch's own files are zip archives, too
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            return {name: torch.from_numpy(stored[name]) for name in stored.files}
    found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError("no dictionary of tensors")
    return found


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
