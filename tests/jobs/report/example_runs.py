"""Run folders as attempts of known times leave them: one that was preempted, and a sweep."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from clipcluster.runs import files
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from tests.shard_writer import ShardWriter

BEGIN = 1_790_000_000.0
HOSTILE = (
    "</script><script>window.pwned = 1</script><img src=https://example.invalid/x onerror=window.pwned=1>"
)
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}
BATCH = 64


def shards(folder: Path) -> Path:
    """Three shards of two plain images each, named by colour and number: red-0, red-1, green-0, …"""
    with ShardWriter(folder, samples_per_shard=2) as writer:
        for number, (name, colour) in enumerate(COLOURS.items()):
            for copy in range(2):
                image = io.BytesIO()
                Image.new("RGB", (160 + 80 * copy, 120), colour).save(image, "PNG")
                writer.add(f"{name}-{copy}", image.getvalue(), "png", [f"a {name} field"], cls=number)
    return folder


def made(path: Path, recipe: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Run:
    """A run folder without attempts."""
    return Run.create(path, {"name": path.name, **recipe}, {"plan": {"total_steps": 400}, **(settings or {})})


def claimed(run: Run, at: float, *, job: str = "4711", host: str = "node-1") -> Attempt:
    """The next attempt, claimed at this second after `BEGIN`."""
    attempt = run.claim(job, host=host, still_running=lambda other: False)
    files.write_json(attempt.path / "claim.json", {**attempt.claim(), "time": BEGIN + at}, private=True)
    return attempt


def told(attempt: Attempt, writer: str, *events: tuple[str, float, dict[str, Any]]) -> None:
    """Events (kind, second, fields) of a writer."""
    lines = [
        {"event": kind, "attempt": attempt.number, "time": BEGIN + at, "job": "4711", **fields}
        for kind, at, fields in events
    ]
    files.append_lines(attempt.path / f"events-{writer}.jsonl", lines)


def trained(
    attempt: Attempt,
    steps: Sequence[int],
    begin: float,
    *,
    lr: float = 1e-3,
    seconds: float = 1.0,
    waited: float = 0.1,
) -> None:
    """Lines of metrics at these steps, the first step begun at this second; each takes so many seconds."""
    lines = []
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 and steps[0] > 1 else 1)
    for step in steps:
        wave = 0.1 * math.sin(step * 1.7) + 0.05 * math.sin(step * 0.31)
        lines.append(
            {
                "attempt": attempt.number,
                "time": BEGIN + begin + (step - first) * seconds,
                "step": step,
                "samples": step * BATCH,
                "epoch": step / 100,
                "gradient_norm": 2.0 + 5 * math.exp(-step / 30) + wave,
                "logit_scale": 14.3 + step / 80,
                "loss": 0.6 + 3.5 * math.exp(-step * lr * 20) + wave,
                "lr": lr * min(1, step / 40) * (0.5 + 0.5 * math.cos(math.pi * step / 400)),
                "samples_per_second": BATCH / seconds,
                "data_wait_seconds": waited,
            }
        )
    files.append_lines(attempt.path / "metrics.jsonl", lines)


def evaluated(run: Run, attempt: int, steps: Sequence[int], *, best: float = 0.8) -> None:
    """Evaluations at these steps."""
    run.evals.mkdir(exist_ok=True)
    for step in steps:
        value = best * (1 - math.exp(-step / 150))
        metrics = {
            "colours/zero_shot_top1": value,
            "colours/zero_shot_images": 6.0,
            "colours/t2i_r1": 0.9 * value,
            "colours/t2i_mean_rank": 1 + 4 * (1 - value),
            "colours/i2t_r1": 0.95 * value,
            "colours/paired_t2i_r1": None if step == steps[0] else value / 2,
        }
        document = {
            "step": step,
            "samples": step * BATCH,
            "attempt": attempt,
            "ema": False,
            "metrics": metrics,
        }
        files.write_json(run.evals / f"step-{step:08d}.json", document)


def long(folder: Path, steps: int) -> Run:
    """A run of one attempt with a logged line for each of so many steps."""
    run = made(folder / "runs" / "long-00000000", {"optim": {"lr": 1e-3}}, {"plan": {"total_steps": steps}})
    attempt, part = claimed(run, 0), 100_000
    for begin in range(0, steps, part):
        trained(attempt, range(begin + 1, min(begin + part, steps) + 1), 10 + begin, lr=1 / steps)
    return run


def details(run: Run, step: int, *, caption: str = "a red field", shard: str = "00000.tar") -> None:
    """What there is to see of the evaluation at a step: one query that failed and one found, each way."""

    def found(number: int, name: str, score: float, right: bool) -> dict[str, Any]:
        place = {"shard": f"{number:05d}.tar", "key": f"{name}-0", "caption": f"a {name} field"}
        return {**place, "score": score, "right": right}

    red = {"shard": shard, "key": "red-0", "caption": caption}
    failed = [found(2, "blue", 0.31, False), found(1, "green", 0.3, False), found(0, "red", 0.25, True)]
    right = [found(0, "red", 0.4, True), found(2, "blue", 0.2, False)]
    classes = [
        {"class": number, "name": HOSTILE if number == 1 else name, "images": 2, "top1": number / 2}
        for number, name in enumerate(COLOURS)
    ]
    error = {"shard": "00001.tar", "key": "green-1", "class": 1, "as": 2, "score": 0.93}
    zero_shot = {
        "classes": classes,
        "confused": [{"class": 1, "as": 2, "images": 1}],
        "confident_errors": [error],
    }
    retrieval = {
        "t2i": [{"query": red, "place": 3, "top": failed}, {"query": red, "place": 1, "top": right}],
        "i2t": [{"query": red, "place": 3, "top": failed}],
    }
    run.evals.mkdir(exist_ok=True)
    document = {
        "step": step,
        "attempt": 1,
        "sets": {"colours": {"retrieval": retrieval, "zero_shot": zero_shot}},
    }
    files.write_json(run.evals / f"details-{step:08d}.json", document)


def _is_preempted(run: Run) -> None:
    """Its first attempt."""
    first = claimed(run, 0)
    for rank in range(2):
        device = {"device": f"cuda:{rank} (NVIDIA H200)"}
        told(first, f"rank-{rank}", ("start", 4, {"rank": rank, "host": "node-1"}), ("device", 6, device))
    told(first, "rank-0", ("phase", 20, {"phase": "first batch"}))
    trained(first, [1, *range(10, 101, 10)], 22)
    told(
        first,
        "rank-0",
        ("checkpoint", 60, {"step": 40, "seconds": 1.5}),
        ("stop_requested", 123, {"step": 101, "reason": "SIGTERM"}),
        ("checkpoint", 125.5, {"step": 101, "seconds": 2.5}),
        (
            "spent",
            125.6,
            {"step": 101, "seconds": {"rehearsal": 2.0, "train": 100.0, "data": 1.1, "save": 2.5}},
        ),
        ("stop", 125.7, {"step": 101}),
    )
    told(first, "verdict", ("requeue", 130, {"ending": "preempted", "code": 85, "reason": "preempted"}))


def _crashes(run: Run) -> None:
    """Its second attempt, which rolls back before."""
    second = claimed(run, 200, host="node-2")
    told(second, "rank-0", ("start", 204, {"rank": 0}), ("phase", 215, {"phase": "first batch"}))
    told(
        second,
        "rank-0",
        ("resume", 210, {"step": 101}),
        ("roll_back", 217, {"step": 101, "reason": "3 steps"}),
        ("spent", 236, {"step": 120, "seconds": {"train": 19.0, "data": 1.0}}),
        ("spent", 256, {"step": 140, "seconds": {"train": 38.0, "data": 2.0}}),
    )
    trained(second, range(110, 141, 10), 216)
    second.bad_sample(0, "00001.tar", "x", "JPEG: truncated")
    second.bad_sample(0, "00001.tar", "y", "JPEG: truncated")
    second.bad_sample(0, HOSTILE, "z", "no image")
    told(second, "verdict", ("requeue", 260, {"ending": "crashed", "code": 1, "reason": "rank 1 died"}))


def _finishes(run: Run) -> None:
    """Its third attempt."""
    third = claimed(run, 262)
    told(third, "rank-0", ("start", 266, {"rank": 0}), ("phase", 280, {"phase": "first batch"}))
    told(third, "rank-0", ("device", 268, {"device": "cuda:0 (NVIDIA H200)"}), ("resume", 270, {"step": 120}))
    trained(third, range(130, 401, 10), 284, seconds=0.75)
    measured = {"train": 207.2, "data": 2.8, "evaluate": 12.0, "save": 8.0}
    told(
        third,
        "rank-0",
        ("evaluation", 511, {"step": 400, "seconds": 12.0}),
        ("spent", 514, {"step": 400, "seconds": measured}),
        ("finish", 519, {"step": 400}),
    )
    third.write_outcome(outcome_name="finished", code=0, rank=0, step=400)
    told(third, "verdict", ("finish", 520, {"ending": "finished", "code": 0}))


def preempted(folder: Path, *, caption: str = "a red field") -> Run:
    """A finished run of three attempts: preempted at second 130, crashed at 260, finished at 520."""
    settings = {
        "evaluate": {"retrieval": ["${DATA}/colours"], "zero_shot": ["${DATA}/colours"]},
        "paths": {name: str(folder / "colours") for name in ("evaluate.retrieval.0", "evaluate.zero_shot.0")},
        "code": "code-1",
    }
    shards(folder / "colours")
    run = made(
        folder / "runs" / "preempted-0a1b2c3d", {"optim": {"lr": 1e-3}, "model": {"embed_dim": 64}}, settings
    )
    run.submitit.mkdir()
    files.append_lines(run.submitit / "jobs.jsonl", [{"job": "4711", "time": BEGIN - 90}])
    (run.path / "code-1").mkdir()
    files.write_json(
        run.path / "code-1" / "snapshot.json", {"commit": "0123abcd", "dirty": True, "digest": "ff"}
    )

    _is_preempted(run)
    _crashes(run)
    _finishes(run)
    evaluated(run, 3, [100, 200, 300, 400])
    details(run, 400, caption=caption)
    return run


def sweep(folder: Path) -> list[Run]:
    """Six finished runs that differ in their learning rate, the last one in its image tower too."""
    runs = []
    for number, lr in enumerate((1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)):
        tower = "vit_small_patch16_224" if number == 5 else "convnextv2_tiny"
        recipe = {"optim": {"lr": lr, "weight_decay": 0.2}, "model": {"image": {"timm": tower}}}
        run = made(folder / "runs" / f"sweep-{number:08x}", recipe, {"checkpoint": {"every": "15 min"}})
        attempt = claimed(run, 10 * number, job=f"47{number}")
        told(attempt, "rank-0", ("start", 10 * number + 2, {"rank": 0}))
        trained(attempt, range(10, 401, 10), 10 * number + 20, lr=lr)
        attempt.write_outcome(outcome_name="finished", code=0, rank=0, step=400)
        told(attempt, "verdict", ("finish", 10 * number + 430, {"ending": "finished", "code": 0}))
        evaluated(run, 1, [200, 400], best=0.5 + 0.08 * number)
        runs.append(run)
    return runs
