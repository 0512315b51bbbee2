"""Watching a run: a bar on a terminal, plain lines elsewhere; Ctrl-C stops watching, never the run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from clipcluster.runs import files
from clipcluster.runs.folder import Run
from jobs.status import EXIT_CODES, Queue, State, last_metrics, state_of, total_steps

LOOK_SECONDS = 0.5
ASK_SECONDS = 10.0  # between two questions to SLURM
LINE_SECONDS = 5.0  # between two plain lines of progress
TOLD = {
    "events-rank-0.jsonl": frozenset({"resume"}),
    "events-verdict.jsonl": frozenset({"requeue", "note", "requeue_refused", "fail", "cancel", "stop"}),
}


class Events:
    """The batch side's and rank 0's events that a person wants to hear of, each once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._seen: dict[str, int] = {}
        self.fresh()

    def fresh(self) -> list[dict[str, Any]]:
        """Those that were not there at the last call."""
        found = []
        for attempt in self._run.attempts():
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
        with _view(run, console) as view:
            state = _watch(run, view, queue)
    except KeyboardInterrupt:
        console.print(
            f"\nNo longer following; {run.name} goes on. "
            f"Follow again: clipcluster logs -f {run.name}   End it: clipcluster cancel {run.name}"
        )
        return 0
    show_end(run, state, console)
    return state.code if state.code or state.name in EXIT_CODES else 1


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
        self._step: int | None = None
        self._told = 0.0

    def __enter__(self) -> View:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def show(self, state: State, line: Mapping[str, Any] | None, events: list[dict[str, Any]]) -> None:
        """Bring what is seen up to date."""
        for event in events:
            self.say(event_text(event))
        if str(state) != self._state:
            self._state = str(state)
            self.say(f"{self.run.name}: {state}")
        if line is not None and line.get("step") != self._step:
            self._step = line.get("step")
            self.progress(line)

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

    def progress(self, line: Mapping[str, Any]) -> None:
        self._bar.update(self._task, completed=line["step"], description=metrics_text(line))


def _view(run: Run, console: Console) -> View:
    return Bar(run, console) if console.is_terminal else View(run, console)


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
    step = f" at step {event['step']:,}" if isinstance(event.get("step"), int) else ""
    reason = " ".join(str(event.get("reason") or "").split())
    return f"attempt {event['attempt']}: {event['event'].replace('_', ' ')}{step}" + (
        f" ({reason})" if reason else ""
    )


def latest_results(run: Run) -> dict[str, Any] | None:
    """The document of the last evaluation, or None."""
    found = sorted(run.evals.glob("step-*.json"))
    document: dict[str, Any] | None = files.read_json(found[-1]) if found else None
    return document


def show_end(run: Run, state: State, console: Console) -> None:
    """The last evaluation as a table, an advice, where the run lies, and what to type next."""
    document = latest_results(run)
    if document and document.get("metrics"):
        console.print(results_table(document))
    if state.advice:
        console.print(state.advice, markup=False, highlight=False, soft_wrap=True)
    console.print(f"run folder: {run.path}", markup=False, highlight=False, soft_wrap=True)
    for line in next_commands(run, state):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def next_commands(run: Run, state: State) -> list[str]:
    """What to type next."""
    name = where(run)
    if state.name == "FINISHED":
        return [
            f"clipcluster metrics {name} --csv     # the training curve",
            f"clipcluster evaluate {name}          # evaluate the last checkpoint again",
            f"tensorboard --logdir {run.tensorboard}",
        ]
    return [f"clipcluster logs {name}", f"clipcluster status {name}"]


def where(run: Run) -> str:
    """How the run is named on the command line: by its name where it lies in ./runs, else by its folder."""
    from clipcluster.runs.folder import runs_folder

    return run.name if (runs_folder().absolute() == run.path.parent) else str(run.path)


def results_table(document: Mapping[str, Any]) -> Table:
    """Results by set and kind: SET/METRIC -> value, shares as percentages."""
    table = Table(title=f"evaluation at step {document['step']:,}", title_justify="left")
    for name in ("set", "measured", "metric"):
        table.add_column(name)
    table.add_column("value", justify="right")
    shown = ("", "")
    for name, value in document["metrics"].items():
        group, _, metric = name.rpartition("/")
        kind, short = kind_of(metric)
        same = shown == (group, kind)
        table.add_row(
            "" if shown[0] == group else group, "" if same else kind, short, value_text(metric, value)
        )
        shown = (group, kind)
    return table


def kind_of(metric: str) -> tuple[str, str]:
    """What a metric belongs to, and its name there."""
    for prefix, kind in (("zero_shot_", "zero-shot"), ("paired_", "retrieval, paired")):
        if metric.startswith(prefix):
            return kind, metric.removeprefix(prefix)
    if metric.startswith(("i2t_", "t2i_")):
        return "retrieval, grouped", metric
    return "counts", metric


def value_text(metric: str, value: float | None) -> str:
    """A share as a percentage, a count whole, a rank with one decimal; None was not finite."""
    if value is None:
        return "not finite"
    if "rank" in metric:
        return f"{value:.1f}"
    if metric.endswith(("images", "captions", "pairs", "classes")):
        return f"{value:,.0f}"
    if 0 <= value <= 1:
        return f"{100 * value:.2f} %"
    return f"{value:g}"


def terminal() -> Console:
    """Standard output, for people."""
    return Console(file=sys.stdout)
