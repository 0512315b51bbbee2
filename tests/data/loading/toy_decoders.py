"""Decoders of further members, in a module that loader workers import quickly."""

import io

import numpy as np


def array(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data))


def score(data: bytes) -> float:
    return float(data)


def array_in_list(data: bytes) -> list[np.ndarray]:
    """Arrays of varying shape."""
    return [array(data)]
