"""Watching a run: a bar on a terminal, plain lines elsewhere; Ctrl-C stops watching, never the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from clipcluster.runs import files
from clipcluster.runs.find import as_typed
from clipcluster.runs.folder import Run
from jobs import results
from jobs.state import ASK_SECONDS, Queue, State, state_of
from jobs.status import last_metrics, total_steps

LOOK_SECONDS = 0.5
LINE_SECONDS = 5.0  # between two plain lines of progress
STARTING = frozenset({"claim", "phase", "resume"})
TOLD = {
    "events-rank-0.jsonl": frozenset({"phase", "resume"}),
    "events-verdict.jsonl": frozenset({"requeue", "note", "requeue_refused", "fail", "cancel", "stop"}),
}
PHASES = {
    "rendezvous": "waiting for all ranks",
    "data": "opening the data",
    "model": "building the model",
    "weights": "loading weights",
    "checkpoint": "looking for a checkpoint",
    "first batch": "waiting for the first batch",
}


class Events:
    """The batch side's and rank 0's events that a person wants to hear of, each once.

    The first call of `fresh` has, of what happened before, where an attempt that is starting stands.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._seen: dict[str, int] = {}
        before = self._found()
        newest = run.newest()
        open_ = newest.number if newest is not None and newest.outcome() is None else None
        starting = before and before[-1]["attempt"] == open_
        self._before = before[-1:] if starting and before[-1]["event"] in STARTING else []

    def fresh(self) -> list[dict[str, Any]]:
        """Those that were not there at the last call."""
        before, self._before = self._before, []
        return [*before, *self._found()]

    def _found(self) -> list[dict[str, Any]]:
        found = []
        for attempt in self._run.attempts():
            if str(attempt.path) not in self._seen:
                self._seen[str(attempt.path)] = 0
                found.append({"event": "claim", **attempt.claim(), "attempt": attempt.number})
            for name, told in TOLD.items():
                path = attempt.path / name
                size = path.stat().st_size if path.exists() else 0
                key = str(path)
                if size == self._seen.get(key, 0):
                    continue
                lines = files.read_lines(path)
                known = self._seen.get(f"{key}#", 0)
                found += [line for line in lines[known:] if line.get("event") in told]
                self._seen[key], self._seen[f"{key}#"] = size, len(lines)
        return found


def follow(run: Run, console: Console, *, queue: Callable[[], Queue] = Queue) -> int:
    """Show the run until it ends, then its results; returns its exit code (0 after Ctrl-C)."""
    try:
        with Bar(run, console) if console.is_terminal else View(run, console) as view:
            state = _watch(run, view, queue)
    except KeyboardInterrupt:
        said = (
            f"\nNo longer following; {run.name} continues.",
            f"  clipcluster logs -f {as_typed(run)}    # follow again",
            f"  clipcluster cancel {as_typed(run)}     # end it",
        )
        for line in said:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return 0
    show_end(run, state, console)
    return state.code or (0 if state.name == "FINISHED" else 1)


def _watch(run: Run, view: View, queue: Callable[[], Queue]) -> State:
    events, asked, state = Events(run), 0.0, State("PENDING")
    while True:
        if time.monotonic() - asked > ASK_SECONDS or _verdict_changed(run):
            asked = time.monotonic()
            state = state_of(run, queue())
        line = last_metrics(run)
        view.show(state, line, events.fresh())
        if state.ended:
            return state
        time.sleep(LOOK_SECONDS)
        if state.name == "RUNNING" and (state.job or "").startswith("local-"):
            asked = 0.0  # costs nothing: no SLURM is asked about local jobs


def _verdict_changed(run: Run) -> bool:
    newest = run.newest()
    path = newest.path / "events-verdict.jsonl" if newest else None
    return path is not None and path.exists() and time.time() - path.stat().st_mtime < 2 * LOOK_SECONDS


class View:
    """Plain lines: one for each event, and one of progress every few seconds."""

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console, self.total = run, console, total_steps(run)
        self._state = ""
        self._attempt = 0
        self._step: int | None = None
        self._told = 0.0

    def __enter__(self) -> View:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def show(self, state: State, line: Mapping[str, Any] | None, events: list[dict[str, Any]]) -> None:
        """Bring what is seen up to date."""
        for event in events:
            self._attempt = max(self._attempt, event["attempt"])
            self.say(event_text(event))
            if event["event"] in STARTING:
                self.starting(event)
        if str(state) != self._state:
            self._state = str(state)
            self.say(f"{self.run.name}: {state}")
        if line is None or line["attempt"] < self._attempt:
            return  # a line of the attempt before
        if line.get("step") != self._step:
            self._step = line.get("step")
            self.progress(line)

    def starting(self, event: Mapping[str, Any]) -> None:
        """An attempt has not come to its first step yet."""

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, line: Mapping[str, Any]) -> None:
        if time.monotonic() - self._told >= LINE_SECONDS or line.get("step") == self.total:
            self._told = time.monotonic()
            total = f"/{self.total:,}" if self.total else ""
            self.say(f"step {line['step']:,}{total}  {metrics_text(line)}")


class Bar(View):
    """A bar that moves, with the events above it."""

    def __init__(self, run: Run, console: Console) -> None:
        super().__init__(run, console)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True)
        self._task: TaskID = self._bar.add_task("waiting", total=self.total)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def starting(self, event: Mapping[str, Any]) -> None:
        self._bar.update(
            self._task, completed=event.get("step"), description=PHASES.get(event.get("phase", ""))
        )

    def progress(self, line: Mapping[str, Any]) -> None:
        self._bar.update(self._task, completed=line["step"], description=metrics_text(line))


def metrics_text(line: Mapping[str, Any]) -> str:
    """The few numbers of a line of metrics that a person follows."""
    parts = []
    if "epoch" in line:
        parts.append(f"epoch {line['epoch']:.2f}")
    if "loss" in line:
        loss = line["loss"]
        parts.append("loss not finite" if loss is None else f"loss {loss:.4f}")
    if "samples_per_second" in line:
        parts.append(f"{line['samples_per_second']:,.0f} samples/s")
    return "  ".join(parts)


def event_text(event: Mapping[str, Any]) -> str:
    """One line for an event."""
    kind, step = event["event"], event.get("step")
    reason = " ".join(str(event.get("reason") or "").split())
    if kind == "claim":
        text = f"starting, as job {event.get('job')} on {event.get('host')}"
    elif kind == "phase":
        text = PHASES.get(event["phase"], event["phase"])
    elif kind == "resume":
        text = f"resuming from step {step:,}"
    else:
        text = kind.replace("_", " ") + (f" at step {step:,}" if isinstance(step, int) else "")
    return f"attempt {event['attempt']}: {text}" + (f" ({reason})" if reason else "")


def show_end(run: Run, state: State, console: Console) -> None:
    """The last evaluation, an advice, the run's folder, and what to type next."""
    document = results.latest(run)
    if document and document.get("metrics"):
        console.print(results.shown(document))
    if state.advice:
        console.print(state.advice, markup=False, highlight=False, soft_wrap=True)
    console.print(f"run folder: {run.path}", markup=False, highlight=False, soft_wrap=True)
    for line in next_commands(run, state):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def next_commands(run: Run, state: State) -> list[str]:
    """What to type next."""
    name = as_typed(run)
    if state.name == "FINISHED":
        return [
            f"clipcluster metrics {name} --plot    # the loss; --columns, --csv and more",
            f"clipcluster evaluate {name}          # evaluate the last checkpoint again",
            f"tensorboard --logdir {run.tensorboard}",
        ]
    return [f"clipcluster logs {name}", f"clipcluster status {name}"]
