"""One attempt at a run: its claim, what it writes, and whether it still owns the run.

A writer is stale as soon as the next attempt exists. The ranks of a node that the scheduler calls dead may
still run: so every rename, deletion and append checks first.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipcluster.errors import StaleAttempt
from clipcluster.runs import files


class Attempt:
    """`attempts/N` of a run.

    `step` is the step this writer has reached (the trainer updates it); events and the outcome carry it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = int(path.name)
        self.step: int | None = None
        self._next = str(path.parent / str(self.number + 1))
        self._job: str | None = None

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.path.parent.parent

    def __repr__(self) -> str:
        return f"Attempt({str(self.path)!r})"

    def is_stale(self) -> bool:
        """Whether the next attempt has claimed the run. One look at the file system."""
        return os.path.exists(self._next)

    def check(self) -> None:
        """Raises StaleAttempt where a later attempt owns the run; called before every change to the run."""
        if self.is_stale():
            raise StaleAttempt(f"attempt {self.number} of {self.run.name}: a later attempt owns the run")

    def claim(self) -> dict[str, Any]:
        """`job` (id), `host`, `time` (seconds since 1970); empty for a folder that holds no claim.

        This and the other reads raise UserError, naming the file, for one that cannot be read.
        """
        return files.read_object(self.path / "claim.json", job=str) or {}

    @property
    def job(self) -> str | None:
        """The id of the job that claimed this attempt."""
        if self._job is None:
            self._job = self.claim().get("job")
        return self._job

    def settings(self) -> dict[str, Any]:
        """The settings in force, as copied when the attempt was claimed."""
        return files.read_yaml(self.path / "settings.yaml")

    def outcome(self) -> dict[str, Any] | None:
        """`outcome.json`, or None while there is none."""
        return files.read_object(self.path / "outcome.json", outcome=str, code=int)

    def event(self, kind: str, *, writer: str, **fields: Any) -> None:
        """Append to `events-WRITER.jsonl`: start, resume, stop_requested, checkpoint, requeue, finish, ….

        `writer` is "rank-R", or the name of the program on the batch side: one writer per file. The line has
        `event`, `attempt`, `time` (seconds since 1970), `job`, `step` where known, and `fields`.
        Raises StaleAttempt.
        """
        line: dict[str, Any] = {"event": kind, **self._stamp(), "job": self.job}
        if self.step is not None:
            line["step"] = self.step
        self._append(f"events-{writer}.jsonl", [{**line, **fields}])

    def start(self, rank: int) -> dict[str, Any]:
        """The event `start` of a rank, with its `node`, `host` and `pid`; empty where there is none."""
        lines = files.read_lines(self.path / f"events-rank-{rank}.jsonl")
        return next((line for line in lines if line.get("event") == "start"), {})

    def nodes(self, ranks: Iterable[int]) -> list[str]:
        """The nodes of these ranks, as far as they are known."""
        return sorted({str(start["node"]) for start in map(self.start, ranks) if "node" in start})

    def phase(self, rank: int, phase: str) -> None:
        """Rank 0's event of what the attempt does before its first step; the other ranks write nothing."""
        if rank == 0:
            self.event("phase", writer="rank-0", phase=phase)

    def metrics(self, line: Mapping[str, Any]) -> None:
        """Append one log step (it needs `step`) to `metrics.jsonl`; rank 0 alone may. Raises StaleAttempt."""
        if not isinstance(line.get("step"), int):
            raise ValueError(f"a line of metrics needs a whole number as its step, got {line.get('step')!r}")
        self._append("metrics.jsonl", [{**self._stamp(), **line}])

    def bad_sample(self, rank: int, shard: str, key: str, reason: str, **extra: Any) -> None:
        """Append a sample that could not be decoded to `bad_samples-RANK.jsonl`. Raises StaleAttempt."""
        line = {**self._stamp(), "shard": shard, "key": key, "reason": reason, **extra}
        self._append(f"bad_samples-{rank}.jsonl", [line])

    def samples(self, rank: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append samples as consumed (`step`, `slot`, `shard`, `key`) to `samples-RANK.jsonl`.

        Raises StaleAttempt.
        """
        self._append(f"samples-{rank}.jsonl", [{"attempt": self.number, **line} for line in lines])

    def _stamp(self) -> dict[str, Any]:
        return {"attempt": self.number, "time": round(time.time(), 3)}

    def _append(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        self.check()
        if lines:
            files.append_lines(self.path / name, lines)

    def write_outcome(
        self,
        *,
        outcome_name: str,
        code: int,
        rank: int,
        step: int | None = None,
        reason: str = "",
        advice: str = "",
    ) -> bool:
        """Make `outcome.json` unless it exists; returns whether this call did. Raises StaleAttempt.

        `outcome_name` is "finished", "stopped" or "failed"; after "stopped" another attempt should follow.
        """
        if outcome_name not in ("finished", "stopped", "failed"):
            raise ValueError(f"an outcome is finished, stopped or failed, not {outcome_name!r}")
        self.check()
        outcome = {
            "outcome": outcome_name,
            "code": int(code),
            "step": self.step if step is None else step,
            "rank": rank,
            "host": socket.gethostname(),
            "reason": reason,
            "advice": advice,
            "go_on": outcome_name == "stopped",
            **self._stamp(),
        }
        return files.link_once(self.path / "outcome.json", outcome)

    def end(self, outcome_name: str, code: int, reason: str = "") -> None:
        """What rank 0 writes where all ranks agreed to end: the outcome, unless there is one, and its event.

        `outcome_name` is "finished" or "stopped". Raises StaleAttempt.
        """
        if self.write_outcome(outcome_name=outcome_name, code=code, rank=0, reason=reason):
            kind = "finish" if outcome_name == "finished" else "stop"
            self.event(kind, writer="rank-0", reason=reason)

    def wait_for_outcome(self, timeout_s: float) -> dict[str, Any] | None:
        """The outcome once some rank has made it, or None after `timeout_s` seconds. Raises StaleAttempt."""
        return self._poll(self.outcome, timeout_s)

    def _poll(self, read: Callable[[], dict[str, Any] | None], timeout_s: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + timeout_s
        while (found := read()) is None and time.monotonic() < deadline:
            self.check()
            time.sleep(0.05)
        return found

    def publish(self, address: str, port: int, token: str) -> None:
        """Tell the other ranks where rank 0 listens (`rendezvous.json`). Raises StaleAttempt."""
        self.check()
        found = {"address": address, "port": port, "token": token, **self._stamp()}
        files.write_json(self.path / "rendezvous.json", found, private=True)

    def find(self, timeout_s: float) -> tuple[str, int, str]:
        """(address, port, token) as rank 0 published them, waiting up to `timeout_s` seconds.

        Raises TimeoutError, and StaleAttempt where a later attempt owns the run.
        """
        file = self.path / "rendezvous.json"
        found = self._poll(lambda: files.read_object(file, address=str, port=int, token=str), timeout_s)
        if found is None:
            raise TimeoutError(f"rank 0 published no address in {self.path} within {timeout_s:g} s")
        return found["address"], found["port"], found["token"]
