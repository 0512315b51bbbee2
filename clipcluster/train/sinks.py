"""Curves beside TensorBoard's: Weights & Biases and trackio (`train.log_to`). Optional packages.

Each is opened, fed and closed by a thread of its own: a server that does not answer holds up no step. One
that fails is given up for the rest of the attempt, with a warning; `metrics.jsonl` has everything.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies

from clipcluster.data.storage.urls import redacted_within
from clipcluster.runs.folder import Run

PROJECT = "clipcluster"
CLOSE_SECONDS = 20.0  # how long the end of a run waits for what is still to be sent
HURRY_SECONDS = 2.0  # the same where the nodes are taken away, or an error is to be told
CONNECT_SECONDS = 3.0
logger = logging.getLogger("clipcluster")


class Writer(Protocol):
    """What a sink writes to."""

    def add(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """A run of Weights & Biases with the run's name; every attempt continues it.

    $WANDB_MODE decides whether it is sent or kept in the run folder for `wandb sync`; without it, it is sent
    where the server can be reached. $WANDB_PROJECT, $WANDB_ENTITY and the others of wandb hold too.
    """

    def __init__(self, run: Run) -> None:
        import wandb

        server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run.name,
            id=run.name,
            resume="allow",
            dir=str(run.path),
            config=redacted_within(run.recipe()),
            mode=os.environ.get("WANDB_MODE") or ("online" if reachable(server) else "offline"),
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("*", step_metric="step")  # an attempt repeats steps of the one before

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio with the run's name, on this machine, or in the Space that $TRACKIO_SPACE_ID names."""

    def __init__(self, run: Run) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        self._run = trackio.init(
            project=project, name=run.name, config=redacted_within(run.recipe()), resume="allow"
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


KINDS: Mapping[str, Callable[[Run], Writer]] = {"wandb": Wandb, "trackio": Trackio}


class Sink(threading.Thread):
    """Feeds one writer, which is opened, used and closed in this thread."""

    def __init__(self, name: str, open_writer: Callable[[], Writer]) -> None:
        super().__init__(name=name, daemon=True)
        self._open, self._lines = open_writer, queue.SimpleQueue[tuple[int, dict[str, float]] | None]()
        self.start()

    def add(self, group: str, line: Mapping[str, Any]) -> None:
        """Add the numbers of a line of metrics, as GROUP/NAME, at its step."""
        values = {
            f"{group}/{name}": value
            for name, value in line.items()
            if name not in ("step", "samples", "epoch") and isinstance(value, (int, float))
        }
        if self.is_alive():
            self._lines.put((line["step"], values))

    def end(self) -> None:
        """Nothing more is added; the thread ends once everything is sent."""
        self._lines.put(None)

    def run(self) -> None:
        try:
            writer = self._open()
            while (line := self._lines.get()) is not None:
                writer.add(*line)
            writer.close()
        except Exception as error:  # whatever a package raises, the run goes on
            logger.warning(
                "%s has nothing more of this attempt: %s: %s", self.name, type(error).__name__, error
            )


def open_sinks(names: Sequence[str], run: Run) -> list[Sink]:
    """The sinks of `train.log_to`."""
    return [Sink(name, lambda kind=KINDS[name]: kind(run)) for name in names]  # type: ignore[misc]


def close_sinks(sinks: Sequence[Sink], seconds: float) -> None:
    """Have all sinks send what is left, for so long at most."""
    for sink in sinks:
        sink.end()
    deadline = time.monotonic() + seconds
    for sink in sinks:
        sink.join(max(0.0, deadline - time.monotonic()))
        if sink.is_alive():
            logger.warning("%s did not take the last lines within %g s", sink.name, seconds)


def reachable(address: str) -> bool:
    """Whether a server, or the proxy before it, takes a connection."""
    given = getproxies().get("https") or address
    place = urlsplit(given if "://" in given else f"//{given}")
    port = place.port or (80 if place.scheme == "http" else 443)
    try:
        socket.create_connection((place.hostname or "", port), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
