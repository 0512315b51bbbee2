"""Curves for other programs: what fails or hangs there does not touch the run."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics
from clipcluster.runtime.network import listen
from clipcluster.runtime.outcome import Outcome
from clipcluster.train import sinks
from clipcluster.train.sinks import Sink, Trackio, Wandb, close_sinks, reachable

LINE = {"step": 5, "samples": 80, "epoch": 0.5, "loss": 1.25, "note": "text", "non": None}


class Kept:
    """Keeps what it is given; raises at a step, or waits in the beginning until it is told."""

    def __init__(self, fails_at: int | None = None, told: threading.Event | None = None) -> None:
        if told:
            told.wait()
        self.fails_at, self.got, self.closed = fails_at, [], False

    def add(self, step: int, values: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("the server is gone")
        self.got.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


def test_a_sink_gets_the_numbers_in_their_order_and_is_closed() -> None:
    kept = Kept()
    sink = Sink("kept", lambda: kept)
    for step in (5, 6):
        sink.add("train", {**LINE, "step": step})
    close_sinks([sink], 10)
    assert kept.got == [(5, {"train/loss": 1.25}), (6, {"train/loss": 1.25})]
    assert kept.closed


def test_one_that_fails_is_given_up_with_a_warning(caplog: Any) -> None:
    kept = Kept(fails_at=6)
    sink = Sink("kept", lambda: kept)
    with caplog.at_level(logging.WARNING, "clipcluster"):
        for step in range(5, 9):
            sink.add("train", {**LINE, "step": step})
        close_sinks([sink], 10)
    assert [step for step, _ in kept.got] == [5]
    (record,) = caplog.records
    assert "kept has nothing more of this attempt: ConnectionError: the server is gone" in record.message
    sink.add("train", LINE)
    assert sink._lines.qsize() <= 3, "nothing is kept for a writer that is gone"


def test_some_that_do_not_answer_hold_nothing_up_together() -> None:
    began, told = time.monotonic(), threading.Event()
    hanging = [Sink("kept", lambda: Kept(told=told)) for _ in range(8)]
    for sink in hanging:
        sink.add("train", LINE)
    close_sinks(hanging, 0.2)
    assert time.monotonic() - began < 1.0
    told.set()
    for sink in hanging:
        sink.join()


def test_a_package_that_is_missing_is_said_and_the_run_finishes(
    toy: ModuleType, run: Any, monkeypatch: Any, caplog: Any
) -> None:
    def missing(of: Run) -> Any:
        raise ModuleNotFoundError("No module named 'wandb'")

    kept = Kept()
    monkeypatch.setattr(sinks, "KINDS", {"wandb": missing, "trackio": lambda of: kept})
    trainer = toy.build(run, toy.claim(run), toy.alone(), toy.Stop(), toy.Script(evaluate_every=6))
    trainer.metrics._log_to = ("wandb", "trackio")
    with caplog.at_level(logging.WARNING, "clipcluster"):
        assert trainer.run() is Outcome.FINISHED
    assert any("No module named 'wandb'" in record.message for record in caplog.records)
    logged = {line["step"]: line["loss"] for line in merged_metrics(run)}
    assert {step: values["train/loss"] for step, values in kept.got if "train/loss" in values} == logged
    assert any("evaluation/" in name for _, values in kept.got for name in values)
    assert kept.closed
    assert not [thread for thread in threading.enumerate() if isinstance(thread, Sink)]


def test_whether_a_server_takes_connections(monkeypatch: Any) -> None:
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with listen("127.0.0.1", 0) as server:
        port = server.getsockname()[1]
        assert reachable(f"http://127.0.0.1:{port}")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert reachable("https://nowhere.invalid")
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{port}")
        assert reachable("https://nowhere.invalid"), "as other programs take it"
    assert not reachable("https://nowhere.invalid"), "the proxy is gone"


@pytest.mark.long
@pytest.mark.parametrize("mode", ["offline", ""])
def test_wandb_itself_offline_over_two_attempts(tmp_path: Path, monkeypatch: Any, mode: str) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens: as on a node without network
    run = Run.create(tmp_path / "toy-00000000", {"name": "toy", "optim": {"lr": 0.1}}, {})
    for step in (5, 6):
        writer = Wandb(run)
        writer.add(step, {"train/loss": 1.0})
        writer.close()
    written = list((run.path / "wandb").glob("offline-run-*/run-toy-00000000.wandb"))
    assert len(written) == 2
    assert all(path.stat().st_size for path in written)


@pytest.mark.long
def test_trackio_itself_on_this_machine(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    run = Run.create(tmp_path / "toy-00000000", {"name": "toy", "optim": {"lr": 0.1}}, {})
    for step in (5, 6):
        writer = Trackio(run)
        writer.add(step, {"train/loss": 1.0})
        writer.close()
    assert any(path.is_file() for path in (tmp_path / "trackio").rglob("*"))
