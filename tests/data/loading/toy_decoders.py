"""Decoders of further members, in a module that loader workers import quickly."""

import io
import os

import numpy as np


def array(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data))


def score(data: bytes) -> float:
    return float(data)


def array_in_list(data: bytes) -> list[np.ndarray]:
    """Arrays of varying shape."""
    return [array(data)]


def threads(data: bytes) -> list[object]:
    """Threads of this process once BLAS was used, and how OpenMP's would wait."""
    numbers = np.ones((700, 700))
    assert (numbers @ numbers)[0, 0] == 700
    return [len(os.listdir("/proc/self/task")), os.environ["OMP_WAIT_POLICY"]]
