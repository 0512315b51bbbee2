"""An attempt is claimed, before any rank starts; at its end the verdict is recorded and acted on.

Standard library only: a scancel gives all of it little time.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from clipcluster.errors import StaleAttempt
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.chains import runs_before
from clipcluster.runs.folder import LISTED_SECONDS, Run
from clipcluster.runtime.job_id import slurm_job_id
from clipcluster.runtime.outcome import Outcome
from jobs.endings import facts, history, notify
from jobs.endings.log import marker, say
from jobs.endings.verdict import Facts, Verdict, blamed, decide
from tools.slurm import JobState, Slurm, SlurmRefused, SlurmUnavailable

REFUSED_SECONDS = 30.0  # how long a requeue that SLURM refuses is tried again
EXCLUDE_SECONDS = 3.0


def claim(run: Run, job_id: str, slurm: Slurm, *, began: float | None = None) -> Attempt | None:
    """The attempt for this job; None where the run is finished, or cancelled for this job.

    None, too, where what comes before the run did not finish, whatever SLURM made of the dependency.

    began: when the job was given its nodes, where that is known.

    Raises AlreadyOwned, naming the job that owns the run and still runs.
    """
    if run.finished():
        say(f"{run.name} is finished already: nothing to do")
        _record_late_finish(run)
        return None
    if job_id in run.cancelled_jobs():
        say(f"{run.name} was cancelled: job {job_id} does nothing")
        return None
    before = [] if run.newest() else [first for first in runs_before(run) if first.exists()]
    deadline = time.monotonic() + LISTED_SECONDS
    while unfinished := [first.name for first in before if not first.finished()]:
        if time.monotonic() > deadline:
            say(f"{run.name} does not start: {', '.join(unfinished)} did not finish")
            return None
        time.sleep(1.0)  # over a network file system, an outcome may show after its job has ended
    attempt = run.claim(
        job_id,
        host=socket.gethostname(),
        still_running=lambda other: history.job_runs(run, other, slurm),
        began=began,
    )
    say(f"{marker(attempt)} (job {job_id} on {socket.gethostname()})")
    return attempt


def _record_late_finish(run: Run) -> None:
    """Record that the run is finished, where its ranks did the last steps after the verdict.

    They ran on a node that SLURM had lost, or the batch script died before its verdict.
    """
    attempt = run.newest()
    if attempt is None or (history.last_verdict(attempt) or {}).get("event") == "finish":
        return
    job_id = attempt.job or ""
    seen = facts.gather(run, attempt, Outcome.FINISHED, job_id=job_id, logs=run.submitit)
    verdict = decide(seen)
    ended = (seen.said or {}).get("time")
    if verdict.action == "finish" and record(run, attempt, seen, verdict, job_id, ended=ended):
        notify.start(run, attempt, seen, verdict)


def conclude(run: Run, attempt: Attempt, code: int, slurm: Slurm, environ: Mapping[str, str]) -> int:
    """Decide, record the verdict, act on it; returns the batch script's exit code."""
    job_id = slurm_job_id(environ)
    job = facts.ask(slurm, job_id)
    seen = facts.on_slurm(run, attempt, code, job, environ)
    verdict = decide(seen)
    node = None
    if verdict.action == "requeue" and verdict.ending in ("crashed", "stalled"):
        node = blamed(seen.errors, facts.down(slurm, job), seen.stalled)
    if not record(run, attempt, seen, verdict, job_id, blamed=node):
        return int(Outcome.STALE)
    if verdict.action != "requeue":
        notify.start(run, attempt, seen, verdict)
        return verdict.code
    refusal = requeue(slurm, job_id, seen)
    if isinstance(refusal, Verdict):
        return refusal.code if record(run, attempt, seen, refusal, job_id) else int(Outcome.STALE)
    if refusal is not None:
        attempt.event("requeue_refused", writer=history.WRITER, reason=refusal)
        refused = replace(verdict, action="fail", reason=f"SLURM did not requeue the job: {refusal}")
        notify.start(run, attempt, seen, refused)
        return verdict.code
    notify.start(run, attempt, seen, verdict)
    if node and job:
        _exclude(slurm, job, job_id, blamed_twice(run, attempt, node))
    return verdict.code


def record(
    run: Run,
    attempt: Attempt,
    seen: Facts,
    verdict: Verdict,
    job_id: str,
    *,
    blamed: str | None = None,
    ended: float | None = None,
) -> bool:
    """Write the verdict to the attempt, and the mark it wants; False where another attempt took over.

    ended: when the attempt ended, in seconds since 1970, if that was not now.
    """
    say(
        f"verdict on attempt {attempt.number} of {run.name}: "
        f"{verdict.ending} -> {verdict.action} ({verdict.code})"
        + (f": {verdict.reason}" if verdict.reason else "")
    )
    if verdict.action == "leave":
        return False
    fields: dict[str, Any] = {
        "ending": verdict.ending,
        "code": verdict.code,
        "reason": verdict.reason,
        "advice": verdict.advice,
        "counts": verdict.counts,
        "checkpoint": seen.checkpoint,
    }
    if seen.raised:
        fields["raised"] = seen.raised
    if blamed:
        fields["blamed"] = blamed
    if ended is not None:
        fields["time"] = ended
    try:
        if verdict.mark:
            run.mark_cancelled([job_id])
        attempt.event(verdict.action, writer=history.WRITER, **fields)
    except StaleAttempt:
        return False
    except OSError as error:  # a full disk must not keep a run from being requeued
        say(f"the verdict could not be recorded: {error}")
    return True


def requeue(slurm: Slurm, job_id: str, seen: Facts) -> str | Verdict | None:
    """Have the job run again; None once it will.

    SLURM is asked for up to `REFUSED_SECONDS`, where it gives no answer for up to `history.SILENT_SECONDS`.
    Else why SLURM did not do it, or the verdict on the job if it was cancelled in the meantime.
    """
    cancelled: Verdict | None = None
    ask = seen.job is not None  # where SLURM was silent, the first try is made at once

    def once() -> None:
        nonlocal cancelled, ask
        # asked just before, for a scancel, or an earlier try whose answer was lost, may have come in between
        job = facts.as_seen(facts.ask(slurm, job_id)) if ask else None
        ask = True
        now = decide(replace(seen, job=job or seen.job))
        if now.action == "cancel":
            cancelled = now
            say(f"job {job_id} was cancelled in the meantime: it is not requeued")
        elif now.action != "note":
            slurm.requeue(job_id)

    refusal = _refusal(once, REFUSED_SECONDS, 1.0, silent=history.SILENT_SECONDS)
    if refusal is not None:
        say(f"SLURM did not requeue job {job_id}: {refusal}")
    return refusal or cancelled


def blamed_twice(run: Run, attempt: Attempt, node: str) -> list[str]:
    """The nodes to exclude when `node` is blamed for this attempt's crash: those blamed twice by now."""
    times = Counter([node, *(each.get("blamed") for each in history.earlier(run, attempt))])
    return sorted(name for name, count in times.items() if name and count >= 2)


def _exclude(slurm: Slurm, job: JobState, job_id: str, nodes: Sequence[str]) -> None:
    """Keep the pending job away from nodes, unless too few would be left for it to start at all."""
    excluded = sorted({*job.excluded, *nodes})
    if not nodes or excluded == sorted(job.excluded):
        return

    def exclude() -> None:
        there = {name for part in slurm.partitions() if part.name == job.partition for name in part.nodes}
        if len(there - set(excluded)) < len(job.nodes):
            say(f"{', '.join(nodes)} blamed twice, but not excluded: too few nodes would be left")
            return
        slurm.exclude(job_id, excluded)
        say(f"{', '.join(nodes)} blamed twice: excluded")

    refusal = _refusal(exclude, EXCLUDE_SECONDS, 0.2)
    if refusal is not None:
        say(f"SLURM did not exclude {', '.join(nodes)}: {refusal}")


def _refusal(ask: Callable[[], None], seconds: float, pause: float, *, silent: float = 0.0) -> str | None:
    """Ask SLURM again and again for so long; None once it did as it was asked, else why it did not.

    `silent`: how long where it gives no answer, if longer; after `seconds` it is asked less often.
    """
    began = time.monotonic()
    while True:
        patience = seconds
        try:
            ask()
            return None
        except SlurmRefused as refusal:
            why = str(refusal)
        except SlurmUnavailable as silence:
            why, patience = str(silence), max(seconds, silent)
        waited = time.monotonic() - began
        if waited >= patience:
            return why
        time.sleep(pause if waited < seconds else 5 * pause)
