"""A conversion as an array of jobs: tasks are killed and preempted, the bytes are the same."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipcluster.data.shards.open import open_folder
from clipcluster.recipe.load import load_cluster
from jobs import convert as array
from tools.convert.convert import convert, kind_named
from tools.convert.plan import Settings
from tools.sandbox.preempt import preempt

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
SETTINGS = Settings(samples_per_shard=15, resize=64)


@pytest.fixture
def images(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two classes of 150 files each, or as the test says, so big that a shard takes a while to resize."""
    numbers = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(numbers.integers(0, 255, (1200, 1200, 3), np.uint8)).save(file, "PNG")
    first = tmp_path / "first.png"
    first.write_bytes(file.getvalue())
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(getattr(request, "param", 150)):
            os.link(first, tmp_path / "images" / name / f"{number:03d}.png")
    return tmp_path / "images"


def tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def shards_done(out: Path) -> int:
    return len(list(out.glob("*.tar")))


def process_of(job_id: str) -> int | None:
    """The Python process of an array member's task."""
    array_id, task = job_id.split("_")
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        wanted = {b"SLURM_PROCID=0", f"SLURM_ARRAY_JOB_ID={array_id}".encode()}
        wanted.add(f"SLURM_ARRAY_TASK_ID={task}".encode())
        if b"submitit.core._submit" in command and wanted <= {*environment}:
            return int(folder.name)
    return None


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def test_tasks_are_killed_and_preempted_and_the_bytes_are_the_same(images, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    options = kind_named("folder").options()
    alone = tmp_path / "alone"
    convert("folder", alone, [images], options, SETTINGS)
    out = tmp_path / "out"
    order = array.ConvertJob("folder", out, [images], options, SETTINGS)
    jobs = array.submit(order, load_cluster(["gpus_per_node=0", "cpus_per_task=2", "partition=low"]), 4)
    assert len(jobs) == 4
    with pytest.raises(array.UserError, match="wait for it"):
        array.refuse_running(out)

    wait_for(lambda: shards_done(out) >= 2)
    killed = next(job for job in jobs if process_of(job) is not None)
    os.kill(process_of(killed), signal.SIGKILL)
    wait_for(lambda: cluster.slurm.job(killed).restarts > 0)
    running = [job for job in jobs if job != killed and process_of(job) is not None]
    preempt(cluster.folder, running[0])
    assert shards_done(out) < 20, "the conversion was over before anything happened to it"

    def over() -> bool:
        for job in (queued := cluster.slurm.queue(job_ids=jobs)):
            if job.state == "PENDING" and job.reason == "BeginTime":
                cluster.slurm.release(job.job_id)
        return not queued

    wait_for(over, 120)

    untouched = [cluster.slurm.job(job) for job in jobs if job not in (killed, running[0])]
    assert [(job.state, job.restarts) for job in untouched] == [("COMPLETED", 0)] * 2
    assert json.loads((out / "conversion.json").read_text())["finished"]
    assert tars(out) == tars(alone)
    assert open_folder(out).fingerprint == open_folder(alone).fingerprint
    assert not list(out.glob(".*.part"))
    assert array.submit(order, load_cluster(["gpus_per_node=0"]), 4) == []


@pytest.mark.long
@pytest.mark.parametrize("images", [600], indirect=True)
def test_a_cancelled_conversion_stays_cancelled_and_goes_on_when_asked(
    images, cluster, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    out = tmp_path / "out"
    words = ["shards", "convert", "folder", str(images), "--out", str(out), "--samples-per-shard", "60"]
    words += ["--resize", "64", "--executor", "slurm", "--jobs", "1", "--cluster", "partition=low"]

    def command(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "jobs.cli", *words, *more], capture_output=True, text=True, check=False
        )

    first = command("--json")
    assert first.returncode == 0, first.stderr
    jobs = json.loads(first.stdout)["jobs"]
    wait_for(lambda: shards_done(out) >= 1)
    again = command()
    assert again.returncode == 2
    assert "wait for it, or end it with: scancel" in again.stderr
    cluster.slurm.cancel(jobs)
    wait_for(lambda: not cluster.slurm.queue(job_ids=jobs))
    assert all(cluster.slurm.job(job).restarts == 0 for job in jobs)
    kept = tars(out)
    assert 0 < len(kept) < 20
    local = words[: words.index("--executor")]
    here = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *local], capture_output=True, text=True, check=False
    )
    assert here.returncode == 0, here.stderr
    assert len(tars(out)) == 20
    assert kept.items() <= tars(out).items()
