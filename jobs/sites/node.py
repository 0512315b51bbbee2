"""What a site check finds out about a node: devices, network, file system. Standard library and psutil."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import psutil

from clipcluster.runs.mounts import file_system
from clipcluster.runtime.accelerators import count_accelerators

_INFINIBAND = Path("/sys/class/infiniband")


def facts(folder: Path) -> dict[str, Any]:
    """The node of this process; sizes in MB, speeds in Mbit/s (0: unknown); `folder` is the shared one."""
    return {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mb": psutil.virtual_memory().total >> 20,
        "shm_mb": shutil.disk_usage("/dev/shm").total >> 20 if os.path.isdir("/dev/shm") else 0,
        "gpus": count_accelerators(),
        "interfaces": interfaces(),
        "infiniband": infiniband(),
        "file_system": file_system(folder),
    }


def interfaces() -> dict[str, dict[str, Any]]:
    """The network interfaces that are up and have an IPv4 address, but for loopback."""
    states, found = psutil.net_if_stats(), {}
    for name, addresses in psutil.net_if_addrs().items():
        own = next((one.address for one in addresses if one.family == socket.AF_INET), None)
        if own and not own.startswith("127.") and name in states and states[name].isup:
            found[name] = {"address": own, "mbit": max(0, states[name].speed)}
    return found


def infiniband(root: Path = _INFINIBAND) -> list[str]:
    """The active ports of InfiniBand and RoCE devices, with their rate: "mlx5_0: 200 Gb/sec (4X HDR)"."""
    found = []
    for port in sorted(root.glob("*/ports/*")):
        try:
            state, rate = ((port / name).read_text().strip() for name in ("state", "rate"))
        except OSError:
            continue
        if "ACTIVE" in state:
            found.append(f"{port.parent.parent.name}: {rate}")
    return found
