"""How long `clipcluster status` takes for many runs: python tests/measure_status.py [RUNS].

Run folders as real ones are left: three attempts of eight hours, two of them preempted, a checkpoint every 15
minutes, eight ranks; a tenth of the runs is at work.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clipcluster.runs import files
from clipcluster.runs.folder import Run

ATTEMPTS, SAVES, RANKS, LINES = 3, 32, 8, 400
NOW = time.time()


def claim(run: Run, job: str, at: int, *, running: bool) -> None:
    """One attempt of eight hours; after the last one the run is finished, or `running`."""
    attempt = run.claim(job, host="n1", still_running=lambda other: False)
    began, step = NOW - 90_000 + at * 30_000, at * SAVES * 400
    files.write_json(attempt.path / "claim.json", {**attempt.claim(), "time": began}, private=True)
    about = {"attempt": attempt.number, "job": job}
    for rank in range(RANKS):
        start = {"event": "start", "time": began + 5, "rank": rank, "host": "n1", **about}
        files.append_lines(attempt.path / f"events-rank-{rank}.jsonl", [start])
    events = [{"event": "resume", "time": began + 20, "step": step, **about}]
    for save in range(SAVES):
        step += 400
        spent = {
            "train": 800.0 * (save + 1),
            "data": 60.0 * (save + 1),
            "save": 2.0 * (save + 1),
            "start": 9.0,
        }
        when = {"time": began + 60 + 870 * (save + 1), "step": step, **about}
        events.append({"event": "spent", **when, "seconds": spent, "total_steps": 40_000})
        events.append({"event": "checkpoint", **when, "seconds": 12.0})
    files.append_lines(attempt.path / "events-rank-0.jsonl", events)
    lines = (
        {
            **about,
            "time": began + 60 + 70 * n,
            "step": step - 10 * (LINES - n),
            "samples": 384 * (step - 10 * (LINES - n)),
            **dict.fromkeys(("epoch", "loss", "lr", "logit_scale", "gradient_norm"), 1.2345678),
            "samples_per_second": 700.0,
            "data_wait_seconds": 0.4,
        }
        for n in range(LINES)
    )
    files.append_lines(attempt.path / "metrics.jsonl", lines)
    last = at == ATTEMPTS - 1
    if not (last and running):
        kind, ending = ("finish", "finished") if last else ("requeue", "preempted")
        verdict = {
            "event": kind,
            "ending": ending,
            "code": 0,
            "reason": "",
            "time": began + 28_000,
            **about,
        }
        files.append_lines(attempt.path / "events-verdict.jsonl", [verdict])


def make(folder: Path, number: int, *, running: bool) -> None:
    """A run of three attempts of eight hours."""
    settings = {
        "plan": {"total_steps": 40_000},
        "cluster": {"environment": {f"V{n}": "x" for n in range(40)}},
    }
    run = Run.create(folder / f"run-{number:08x}", {"name": "run"}, settings)
    run.submitit.mkdir()
    job = str(1000 + number)
    files.append_lines(run.submitit / "jobs.jsonl", [{"job": job, "time": NOW - 90_000, "executor": "slurm"}])
    step = ATTEMPTS * SAVES * 400
    for at in range(ATTEMPTS):
        claim(run, job, at, running=running)
    for save in range(3):
        checkpoint = run.checkpoints / f"step-{step - 400 * save:08d}"
        checkpoint.mkdir()
        content = {}
        for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"):
            (checkpoint / name).write_text("{}")
            content[name] = {"bytes": 2, "sha256": "0" * 64}
        files.write_json(checkpoint / "manifest.json", {"files": content, "recipe": {"a": ["x"] * 200}})


def cpu_seconds() -> float:
    """Of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    os.fsync = lambda descriptor: None  # nothing of it has to outlive the machine
    with tempfile.TemporaryDirectory() as scratch:
        runs = Path(scratch) / "runs"
        for number in range(count):
            make(runs, number, running=number % 10 == 0)
        squeue = Path(scratch) / "bin" / "squeue"
        squeue.parent.mkdir()
        jobs = [1000 + n for n in range(0, count, 10)]
        lines = "\\n".join(f"{job}|RUNNING|low|me|1:00|8:00|N/A|n1|None|run" for job in jobs)
        squeue.write_text(f'#!/bin/sh\nprintf "{lines}\\n"\n')
        squeue.chmod(0o755)
        environment = {"PATH": f"{squeue.parent}:/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
        for words in (["--json"], []):
            for _ in range(3):
                began, busy = time.perf_counter(), cpu_seconds()
                command = [sys.executable, "-m", "jobs.cli", "status", "--runs", str(runs), *words]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                took = time.perf_counter() - began
                cpu, shown = cpu_seconds() - busy, " ".join(words) or "table"
                print(
                    f"{count} runs, {shown}: {took:.2f} s, {cpu:.2f} s of a core ({len(done.stdout):,} bytes)"
                )


if __name__ == "__main__":
    main()
