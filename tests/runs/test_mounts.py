"""Which file system a folder is on, and whether what others write there shows late."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from clipcluster.runs.mounts import file_system, mount_of, shows_late

MOUNTS = [
    SimpleNamespace(device=device, mountpoint=mountpoint, fstype=kind)
    for device, mountpoint, kind in (
        ("proc", "/proc", "proc"),
        ("/dev/sda1", "/", "ext4"),
        ("server:/old", "/home", "nfs4"),
        ("server:/home", "/home", "nfs4"),
        ("10.0.0.1@o2ib:/scratch", "/scratch", "lustre"),
    )
]


@pytest.mark.parametrize(
    ("folder", "device"),
    [
        ("/home/me/runs", "server:/home"),
        ("/homework", "/dev/sda1"),
        ("/scratch", "10.0.0.1@o2ib:/scratch"),
    ],
)
def test_the_file_system_of_a_folder(folder, device) -> None:
    found = mount_of(Path(folder), MOUNTS)
    assert found is not None
    assert found.device == device


def test_of_this_machine(tmp_path):
    for folder in (tmp_path, Path("/proc/self"), Path("/")):
        kind = subprocess.run(
            ["findmnt", "-no", "FSTYPE", "-T", folder], capture_output=True, text=True
        ).stdout
        assert file_system(folder) == kind.strip()


@pytest.mark.parametrize(
    ("kind", "late"), [("ext4", False), ("nfs4", True), ("lustre", True), ("fuse.x", True)]
)
def test_on_a_network_what_others_write_may_show_late(monkeypatch, kind, late):
    mounted = [SimpleNamespace(device="x", mountpoint="/", fstype=kind)]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounted)
    assert shows_late(Path("/runs")) == late
