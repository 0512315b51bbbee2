"""What the ranks and the batch side printed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from clipcluster.errors import UserError
from clipcluster.runs.folder import Run
from jobs.submissions import job_ids, log_folder

S = TypeVar("S")
LOOK_SECONDS = 0.5


def log_files(run: Run, *, rank: int = 0, attempt: int | None = None) -> list[Path]:
    """The files that tell of one rank in one attempt (default: the newest): its own, else its job's.

    Raises UserError, saying what is there.
    """
    chosen = run.attempt(attempt) if attempt is not None else run.newest()
    if chosen is not None:
        own = chosen.path / f"rank-{rank}.out"
        if own.exists():
            return [own]
        ranks = sorted(int(path.stem.split("-")[1]) for path in chosen.path.glob("rank-*.out"))
        if ranks:
            raise UserError(
                f"attempt {chosen.number} of {run.name} has no rank {rank}; its ranks: 0 to {ranks[-1]}"
            )
    # where no rank came to its own file: what submitit, srun and the batch script wrote
    found = [path for path in _of_jobs(run, chosen.job if chosen else None) if path.stat().st_size]
    if not found:
        raise UserError(f"{run.name} has printed nothing yet; see: clipcluster status {run.name}")
    return found


def _of_jobs(run: Run, job: str | None) -> list[Path]:
    """submitit's files of one job of the run, or of all."""
    if job is not None:
        return sorted(log_folder(run, job).glob(f"{job}_*_log.err"))
    shared = [one for one in job_ids(run) if log_folder(run, one) != run.submitit]
    return [*sorted(run.submitit.glob("*_log.err")), *(path for one in shared for path in _of_jobs(run, one))]


def followed(run: Run, *, rank: int = 0, attempt: int | None = None) -> Callable[[], list[Path]]:
    """A function that gives the files of the newest attempt and of those that follow (or of `attempt` alone).

    As long as no rank has printed anything, those of its job; none before anything was printed at all.
    Raises UserError for a rank or an attempt that does not exist.
    """
    newest = run.attempt(attempt) if attempt is not None else run.newest()
    if newest is not None and any(newest.path.glob("rank-*.out")):
        log_files(run, rank=rank, attempt=attempt)
    first = attempt or (newest.number if newest else 1)

    def paths() -> list[Path]:
        attempts = [one for one in run.attempts() if one.number >= first and attempt in (None, one.number)]
        own = [path for one in attempts if (path := one.path / f"rank-{rank}.out").exists()]
        if own:
            return own
        with suppress(UserError):
            return log_files(run, rank=rank, attempt=attempt)
        return []

    return paths


def stream(paths: Callable[[], list[Path]], ended: Callable[[], bool]) -> Iterator[str]:
    """The content of `paths()` and what is added to it, also in later attempts, until `ended()`.

    A file that came to the list only later is read from its beginning, after what is left of the ones before;
    that of a later attempt begins with a line that says so.
    """
    return (text for _, text in stream_all([None], lambda nobody: paths(), ended))


def stream_all(
    sources: Sequence[S], files: Callable[[S], list[Path]], ended: Callable[[], bool]
) -> Iterator[tuple[S, str]]:
    """What several runs write, until `ended()`, each part with its run; `files` are those of a run now."""
    read: list[dict[Path, int]] = [{} for _ in sources]
    while True:
        last = ended()  # asked before reading: what was written until then is printed
        for source, known in zip(sources, read, strict=True):
            for path in dict.fromkeys([*known, *files(source)]):
                if known and path not in known and path.parent.name.isdecimal():
                    yield source, f"==> attempt {path.parent.name}\n"
                with path.open("rb") as file:
                    file.seek(known.get(path, 0))
                    content = file.read()
                known[path] = known.get(path, 0) + len(content)
                if content:
                    yield source, content.decode(errors="replace")
        if last:
            return
        time.sleep(LOOK_SECONDS)
