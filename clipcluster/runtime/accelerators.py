"""How many accelerators a process on this machine would find. Standard library only: torch is not loaded."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

_KFD = Path("/sys/class/kfd/kfd/topology/nodes")  # AMD's driver: one folder a device, processors included


def count_accelerators(environ: Mapping[str, str] | None = None) -> int:
    """The GPUs torch would see here: the driver's count, limited by ``CUDA_VISIBLE_DEVICES`` and its like.

    NVIDIA's driver is asked through its management library, which neither starts a CUDA context nor keeps the
    process from forking; AMD's by its folder in ``/sys``. 0 where neither driver is installed or answers.
    """
    environ = os.environ if environ is None else environ
    nvidia = _count_nvidia()
    if nvidia:
        return _visible(nvidia, environ.get("CUDA_VISIBLE_DEVICES"))
    amd = _count_amd()
    for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        amd = _visible(amd, environ.get(name))
    return amd


def _count_nvidia() -> int:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    if library.nvmlInit_v2() != 0:
        return 0
    count = ctypes.c_uint(0)
    answer = library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    library.nvmlShutdown()
    return count.value if answer == 0 else 0


def _count_amd(nodes: Path = _KFD) -> int:
    """Nodes with SIMD units; a processor's node has none."""
    found = 0
    for properties in nodes.glob("*/properties"):
        values = dict(line.split(maxsplit=1) for line in properties.read_text().splitlines() if " " in line)
        found += int(values.get("simd_count", "0")) > 0
    return found


def _visible(count: int, names: str | None) -> int:
    """How many of `count` devices a variable leaves: as CUDA reads it, up to the first that does not exist.

    Devices may be named by number or by an identifier (``GPU-…``, ``MIG-…``).
    """
    if names is None:
        return count
    seen: set[str] = set()
    for name in (entry.strip() for entry in names.split(",")):
        exists = int(name) < count if name.isdigit() else name.startswith(("GPU-", "MIG-"))
        if not exists:
            break
        if name in seen:  # CUDA takes no list that names a device twice
            return 0
        seen.add(name)
    return len(seen)
