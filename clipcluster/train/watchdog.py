"""A rank without progress: it says where it is, and leaves, so that the run is requeued. No torch.

Every rank watches itself, and none needs another for it: what holds up one rank holds up all of them, so all
notice it at nearly the same time, but for those that were stopped or sit on a dead node. What they find meets
in `attempts/N/stalled/`: each rank writes where it is, and the first one that finds all reports there, or has
waited long enough, names the ranks that hold up the others. They leave together: the first that leaves takes
the others with it, and what they still had to say.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typing_extensions import Self

from clipcluster.errors import StaleAttempt
from clipcluster.runs import files
from clipcluster.runs.attempts import Attempt
from clipcluster.runtime import stacks
from clipcluster.runtime.outcome import Outcome
from clipcluster.runtime.pulse import STEP, Pulse

TIMES_MEDIAN = 20
AT_MOST_SECONDS = 450.0
"""It counts up to here where there are other ranks, which soon take a silent one for lost."""
OTHERWISE_SECONDS = 1800.0
"""Patience with what is no step and says nothing meanwhile: between two batches of an evaluation, say."""
AWAITED_SECONDS = 75.0
"""How long a report may take to be seen on other nodes: those of a network file system look once a minute."""
REPORT_SECONDS = 90.0
"""A rank leaves so long after that at the latest: what it reports may go to the disk that hangs."""
JUDGED = "judged"
_log = logging.getLogger("clipcluster")


class Watchdog(threading.Thread):
    """Inside, as a context, this process ends with `Outcome.STALLED` once it has stalled; nothing is saved.

    Only the time in which this thread itself runs counts, so that a process that was suspended and continued
    has not stalled.

    Args:
        least_seconds: patience with a step, and `TIMES_MEDIAN` times the median of the last steps.
    """

    def __init__(self, pulse: Pulse, attempt: Attempt, rank: int, size: int, least_seconds: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._pulse, self._attempt, self._rank, self._size = pulse, attempt, rank, size
        self._least, self._most = least_seconds, AT_MOST_SECONDS if size > 1 else math.inf
        self._poll = min(5.0, least_seconds / 10)
        self._awaited = max(2.0, min(AWAITED_SECONDS, least_seconds / 4))
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self.join()

    def patience(self) -> float:
        """Seconds without a sign of life after which this rank has stalled."""
        median = self._pulse.median_seconds
        if median is None or self._pulse.doing not in STEP:
            return max(self._least, OTHERWISE_SECONDS)
        return max(self._least, min(self._most, TIMES_MEDIAN * median))

    def run(self) -> None:
        stacks.allow_py_spy()
        beats, waited, before = -1, 0.0, time.monotonic()
        while not self._closed.wait(self._poll):
            now = time.monotonic()
            waited += min(now - before, 2 * self._poll)
            before = now
            if self._pulse.beats != beats:
                beats, waited = self._pulse.beats, 0.0
            patience = self.patience()
            if waited > patience:
                self._end(beats, waited, patience)
            # For a thread that never yields the interpreter: then this one is not there to report.
            faulthandler.dump_traceback_later(patience + self._awaited + REPORT_SECONDS, file=2)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, beats: int, seconds: float, patience: float) -> None:
        """Report, and leave; returns where this rank makes progress again meanwhile."""
        faulthandler.cancel_dump_traceback_later()
        code: list[Outcome | None] = [Outcome.STALLED]
        report = threading.Thread(target=self._report, args=(beats, seconds, patience, code), daemon=True)
        report.start()
        report.join(self._awaited + REPORT_SECONDS)
        if code[0] is not None:
            os._exit(code[0])

    def _report(self, beats: int, seconds: float, patience: float, code: list[Outcome | None]) -> None:
        """Say where this rank is, what may take long last; `code` becomes None if it makes progress again."""
        state, place = self._pulse.state, self._pulse.place
        _log.error("no sign of life for %.0f s (%.0f s are allowed): %s", seconds, patience, state)
        try:
            self._attempt.check()
            stacks.dump_stacks()
            reports = Reports(self._attempt.path / "stalled", self._size, self._awaited)
            mine = {"doing": state, "place": place, "step": self._attempt.step or 0}
            reports.write(self._rank, {**mine, "seconds": round(seconds, 1), "pid": os.getpid()})
            reports.wait()
            if self._pulse.beats != beats:
                code[0] = None
                _log.warning("this rank makes progress again")
                reports.withdraw(self._rank)
                return
            with _logged():
                if reports.take(JUDGED):
                    self._judge(reports.read(), seconds)
            with _logged():
                self._write_collectives(reports.folder)
            with _logged():
                self._look_at_silent(reports)
            stacks.dump_native()
            reports.leave(self._rank)
        except StaleAttempt as stale:
            code[0] = Outcome.STALE
            _log.warning("%s", stale)
        except Exception:
            _log.exception("the stall could not be reported")

    def _judge(self, reports: Mapping[int, Mapping[str, Any]], seconds: float) -> None:
        """Write the event that names the ranks which hold up the others."""
        ranks = behind(reports, self._size)
        nodes = self._attempt.nodes(ranks)
        doing = sorted({str(reports[rank]["doing"]) if rank in reports else "silent" for rank in ranks})
        who = named(ranks, nodes) if len(ranks) < self._size else "all ranks"
        reason = f"no step for {seconds:.0f} s: {who}: {'; '.join(doing)}"
        _log.error("%s", reason)
        self._attempt.event(
            "stalled",
            writer=f"rank-{self._rank}",
            ranks=ranks,
            seconds=round(seconds, 1),
            nodes=nodes if len(ranks) < self._size else [],
            silent=ranks[0] not in reports,
            doing=doing,
            reason=reason,
        )

    def _write_collectives(self, folder: Path) -> None:
        """Write what the flight recorders hold, if there is something."""
        if records := stacks.flight_records():
            files.write_json(folder / f"collectives-{self._rank}.json", records)

    def _look_at_silent(self, reports: Reports) -> None:
        """Say what can be seen from outside of the silent ranks of this node."""
        here = self._attempt.start(self._rank).get("node")
        for rank in reports.silent():
            start = self._attempt.start(rank)
            if start and start["node"] == here and reports.take(f"looked-at-{rank}"):
                _log.error("rank %d: %s", rank, stacks.describe(start["pid"]))
                stacks.look_into(start["pid"], "--nonblocking")


class Reports:
    """The folder in which the ranks of a stalled attempt meet.

    `rank-R.json` is what rank R said; it becomes `ahead-R.json` once R makes progress again. Those that still
    wait count it too: R is not silent. In a later stall of the attempt it counts no longer.

    Args:
        awaited: seconds to wait for other ranks. Reports that are more than twice as far apart belong to two
            stalls: the patience, which passes between them, is four times as long.
    """

    def __init__(self, folder: Path, size: int, awaited: float) -> None:
        self.folder, self._size, self._awaited = folder, size, awaited
        self._began = math.inf
        folder.mkdir(exist_ok=True)

    def write(self, rank: int, report: Mapping[str, Any]) -> None:
        """Say where a rank is."""
        path = self.folder / f"rank-{rank}.json"
        files.write_json(path, report)
        self._began = path.stat().st_mtime - 2 * self._awaited

    def withdraw(self, rank: int) -> None:
        """Say that a rank makes progress again."""
        (self.folder / f"rank-{rank}.json").rename(self.folder / f"ahead-{rank}.json")

    def wait(self) -> None:
        """Wait for the reports of all ranks, or until another rank has waited long enough."""
        self._wait(lambda: not self.silent() or (self.folder / JUDGED).exists())

    def leave(self, rank: int) -> None:
        """Say that a rank has nothing more to say, and wait until this holds for all that stand still."""
        self.take(f"done-{rank}")
        self._wait(lambda: all((self.folder / f"done-{other}").exists() for other in self._found("rank")))

    def silent(self) -> list[int]:
        """The ranks that reported nothing."""
        return sorted(set(range(self._size)) - self._reported())

    def take(self, work: str) -> bool:
        """Whether the caller is the first to ask for this work, which one rank does for all."""
        try:
            os.mkdir(self.folder / work)
        except FileExistsError:
            return False
        return True

    def read(self) -> dict[int, dict[str, Any]]:
        """What each rank said, by rank."""
        found = {rank: self._read("rank", rank) or self._read("ahead", rank) for rank in self._reported()}
        return {rank: report for rank, report in found.items() if report}

    def _reported(self) -> set[int]:
        ranks = set(self._found("rank"))  # before the others, or a rank that gets ahead now is in neither
        ahead = self._found("ahead")
        return ranks | {rank for rank, path in ahead.items() if path.stat().st_mtime >= self._began}

    def _found(self, kind: str) -> dict[int, Path]:
        return {int(path.stem.removeprefix(f"{kind}-")): path for path in self.folder.glob(f"{kind}-*.json")}

    def _read(self, kind: str, rank: int) -> dict[str, Any] | None:
        return files.read_object(self.folder / f"{kind}-{rank}.json", place=int, step=int)

    def _wait(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._awaited
        while not true() and time.monotonic() < deadline:
            time.sleep(min(1.0, self._awaited / 10))


@contextmanager
def _logged() -> Iterator[None]:
    """One part of a report may fail without the others: a full disk takes no file, but the log may."""
    try:
        yield
    except StaleAttempt:
        raise
    except Exception:
        _log.exception("the stall could not be recorded")


def behind(reports: Mapping[int, Mapping[str, Any]], size: int) -> list[int]:
    """The ranks that hold up the others: those that said nothing, else those that got least far.

    reports: by rank, `step` and `place` (`Pulse.place`).
    """
    silent = [rank for rank in range(size) if rank not in reports]
    if silent:
        return silent
    reached = {rank: (report["step"], report["place"]) for rank, report in reports.items()}
    least = min(reached.values())
    return sorted(rank for rank, place in reached.items() if place == least)


def named(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """Ranks and their nodes in words, the first eight of each."""
    shown, where = (", ".join(map(str, names[:8])) + ", …" * (len(names) > 8) for names in (ranks, nodes))
    return f"rank{'s' * (len(ranks) > 1)} {shown}" + (f" on {where}" if nodes else "")
