"""Checkpoints against the disk: how many are kept, free space, quotas, speed."""

import psutil
import pytest

from clipcluster.recipe.sections.checkpoint import Keep
from clipcluster.runs.folder import Run
from clipcluster.runs.mounts import mount_of
from jobs.check import storage
from tests.jobs.check.plans import plan_of

QUOTA = """\
Disk quotas for user me (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
      /dev/sda1    2000       0       0       0      10       0       0       0
   server:/home 900000* 1000000 1100000       0    1234       0       0       0
"""
LUSTRE = "      /scratch/me 5000000 0 6000000 - 812 0 0 -\n"


@pytest.mark.parametrize(
    ("keep", "plan", "expected"),
    [
        ({"last": 3}, {"total_steps": 100, "checkpoint_every": 10}, (3, 3)),
        ({"last": 3}, {"total_steps": 15, "checkpoint_every": 10}, (2, 2)),
        ({"last": 2, "best": {"metric": "loss", "count": 4}}, {"total_steps": 100}, (2, 6)),
        ({"last": 2}, {"total_steps": 100, "keep_every": 20}, (2, 7)),
    ],
)
def test_how_many_are_kept(keep, plan, expected) -> None:
    assert storage.kept_checkpoints(Keep.model_validate(keep), plan_of(**plan)) == expected


def test_what_a_quota_leaves() -> None:
    assert storage.parse_quota(QUOTA, "server:/home") == storage.Quota(200000 * 1024, 100000 * 1024)
    assert storage.parse_quota(QUOTA, "/dev/sda1") is None  # no limit
    assert storage.parse_quota(QUOTA, "/dev/sdc1") is None
    assert storage.parse_quota(LUSTRE, None) == storage.Quota(1000000 * 1024, 1000000 * 1024)
    assert storage.parse_quota("", None) is None


def test_a_quota_counts_where_it_is_less_than_the_disk(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    mount = mount_of(tmp_path, psutil.disk_partitions(all=True))
    assert mount is not None
    assert mount.fstype != "lustre"
    (folder / "quota").write_text(
        f"#!/bin/sh\ncase $3 in -u) echo '  {mount.device} 1000 0 9000 0 5 0 0 0';;\n"
        f"-g) echo '  {mount.device} 1000 4000 0 0 5 0 0 0';; esac\n"
    )
    (folder / "quota").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    run, plan = Run(tmp_path / "runs" / "new"), plan_of(total_steps=100, checkpoint_every=10, keep_every=10)
    found = storage.compare([run], 100_000, Keep(last=2), plan)
    assert (found.errors, found.warnings) == ([], [])
    assert found.summary[0].endswith("2.9 MB left of your quota")
    found = storage.compare([run], 500_000, Keep(last=2), plan)
    assert "12 checkpoints kept and one being written: 6.2 MB in the whole run" in found.warnings[0]
    found = storage.compare([run], 2_000_000, Keep(last=2), plan)
    assert found.errors[0].startswith(
        "checkpoint.keep: 1.9 MB each, the last 2 and one being written are 5.7 MB, and "
    )
    assert found.errors[0].endswith("or choose a larger disk with --runs")
    several = [Run(tmp_path / "runs" / name) for name in ("new", "newer", "newest")]
    (error,) = storage.compare(several, 700_000, Keep(last=2), plan).errors  # one alone would fit
    assert "of 3 runs together are 6.0 MB" in error
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    (run.checkpoints / "step-00000001" / "model.safetensors").write_bytes(bytes(4_000_000))
    assert storage.compare([run], 2_000_000, Keep(last=2), plan).errors == []  # they are replaced
    assert storage.size_of_newest(run) == 4_000_000


def test_the_speed_of_a_disk_is_measured_and_nothing_left(tmp_path) -> None:
    assert storage.write_speed(tmp_path / "not" / "yet", 1000) > 1_000_000
    assert list(tmp_path.rglob("*")) == []
