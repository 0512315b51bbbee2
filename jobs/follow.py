"""Watching a run: a bar on a terminal, plain lines elsewhere; Ctrl-C stops watching, never the run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clipcluster.runs import files
from clipcluster.runs.folder import Run
from clipcluster.runs.names import as_typed
from jobs.evaluate import latest, shown
from jobs.state import Queue, State, Watched, evaluations_of, last_metrics, total_steps

LOOK_SECONDS = 0.5
LINE_SECONDS = 5.0  # between two plain lines of progress
STARTING = frozenset({"claim", "phase", "resume"})
TOLD = {
    "events-rank-0.jsonl": frozenset({"phase", "resume", "stage", "slow"}),
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
        self._attempt = 0  # the newest seen
        self._known: Counter[Path] = Counter()  # lines of each file
        before = self._found()[-1:]
        starting = before and before[0]["event"] in STARTING
        self._before = before if starting and run.attempt(self._attempt).outcome() is None else []

    def fresh(self) -> list[dict[str, Any]]:
        """Those that were not there at the last call."""
        before, self._before = self._before, []
        return [*before, *self._found()]

    def _found(self) -> list[dict[str, Any]]:
        found = []
        for attempt in self._run.attempts():
            if attempt.number < self._attempt - 1:  # over a network file system, ends may show after a claim
                continue
            if attempt.number > self._attempt:
                self._attempt = attempt.number
                found.append({"event": "claim", **attempt.claim(), "attempt": attempt.number})
            for name, told in TOLD.items():
                path = attempt.path / name
                lines = files.read_lines(path)
                found += [line for line in lines[self._known[path] :] if line.get("event") in told]
                self._known[path] = len(lines)
        return found


def follow(run: Run, console: Console) -> int:
    """Show the run until it ends, then its results; returns its exit code (0 after Ctrl-C)."""
    watched, events, view = Watched(run), Events(run), View(run, console)
    try:
        with view.bar:
            while True:
                state = watched.state()
                view.show(state, last_metrics(run), events.fresh())
                if state.ended:
                    break
                time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        console.out(f"\nNo longer following; {run.name} continues.", highlight=False)
        console.out(f"  clipcluster logs -f {as_typed(run)}    # follow again", highlight=False)
        console.out(f"  clipcluster cancel {as_typed(run)}     # end it", highlight=False)
        return 0
    show_end(run, state, console)
    return state.code or (0 if state.name == "FINISHED" else 1)


class View:
    """A bar on a terminal, elsewhere a line of progress every few seconds; the events as lines."""

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console, self.total = run, console, total_steps(run)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self.bar.add_task("waiting", total=self.total)
        self._state = ""
        self._attempt = 0
        self._step: int | None = None
        self._told = 0.0

    def show(self, state: State, line: Mapping[str, Any] | None, events: list[dict[str, Any]]) -> None:
        """Bring what is seen up to date."""
        for event in events:
            self._attempt = max(self._attempt, event["attempt"])
            self.say(event_text(event))
            if event["event"] in STARTING:
                phase = PHASES.get(event.get("phase", ""))
                self.bar.update(self._task, completed=event.get("step"), description=phase)
        if str(state) != self._state:
            self._state = str(state)
            self.say(f"{self.run.name}: {state}")
        if line is None or line["attempt"] < self._attempt:
            return  # a line of the attempt before
        if line.get("step") != self._step:
            self._step = line.get("step")
            self._progress(line)

    def say(self, text: str) -> None:
        self.console.out(text, highlight=False)

    def _progress(self, line: Mapping[str, Any]) -> None:
        self.bar.update(self._task, completed=line["step"], description=metrics_text(line))
        due = time.monotonic() - self._told >= LINE_SECONDS or line["step"] == self.total
        if due and not self.console.is_terminal:
            self._told = time.monotonic()
            total = f"/{self.total:,}" if self.total else ""
            self.say(f"step {line['step']:,}{total}  {metrics_text(line)}")


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
    elif kind == "stage":
        text = f"{event['trainable']:,} of {event['parameters']:,} parameters train from step {step:,}"
    elif kind == "resume":
        text = f"resuming from step {step:,}"
    else:
        text = kind.replace("_", " ") + (f" at step {step:,}" if isinstance(step, int) else "")
    return f"attempt {event['attempt']}: {text}" + (f" ({reason})" if reason else "")


def show_end(run: Run, state: State, console: Console) -> None:
    """The last evaluation and those that are owed, an advice, the run's folder, and what to type next."""
    document = latest(run)
    if document and document.get("metrics"):
        console.print(shown(document))
    name = as_typed(run)
    for owed, found in evaluations_of(run, Queue()):
        console.out(f"evaluation of step {owed.step:,}: {found}", highlight=False)
    following = [f"  clipcluster logs {name}", f"  clipcluster status {name}"]
    if state.name == "FINISHED":
        following = [
            f"  clipcluster metrics {name} --plot    # the loss; --columns, --csv and more",
            f"  clipcluster evaluate {name} --all    # evaluate the last checkpoint again, with every figure",
            f"  clipcluster report {name} --out report.html    # curves, figures and pictures, for a browser",
            f"  tensorboard --logdir {run.tensorboard}",
        ]
    for line in filter(None, [state.advice, f"run folder: {run.path}", *following]):
        console.out(line, highlight=False)
