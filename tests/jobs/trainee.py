"""A training without torch: steps of a tenth of a second, real checkpoints, real signals, real exits.

The ranks exchange their wishes at every step over TCP through rank 0, as a training does over gloo. How it
misbehaves is told by $TRAINEE, a JSON object; each of its entries holds for the attempts named, else for all:

    steps: how many there are (default 20)       seconds: of a step (default 0.1)
    save_every: steps between checkpoints (default 5)
    crash: {step, rank, attempts}                os._exit(1); or {at, rank}: at one step for each attempt
    raises: {step, rank, error, attempts}        an exception of that name, or a Failure
    hang: {step, rank, attempts}                 never comes to the next step, and ignores the stop
    waits: {step, file}                          every rank, before that step, until the file is there
    imports: seconds                             of what stands for the import of torch
    deaf: {attempts, until}                      all ranks ignore what they agreed on (till that signal comes)
    save_seconds: seconds                        that the save of a stop takes
    eats: {step, rank, attempts, megabytes}     takes so much more memory, 50 MB at a time
    evaluation: {seconds, fails}                 owed at every save, and made by `evaluate` in its own job
    stalled_after: seconds                       a watchdog ends ranks without progress
"""

import builtins
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import time

from clipcluster.runs import evaluations, files
from clipcluster.runtime.outcome import DataError, LostPeers, Outcome, OutOfMemory, RecipeFailure
from clipcluster.runtime.pulse import FEATURES, Pulse
from clipcluster.runtime.stop import Wish
from clipcluster.train.watchdog import Watchdog

FAILURES = {
    "DataError": DataError("shard 00003.tar changed"),
    "RecipeFailure": RecipeFailure("the starting weights of image do not match", "Restore the file."),
    "OutOfMemory": OutOfMemory("a training step: CUDA out of memory", "Set train.micro_batch to 8."),
}


class Peers:
    """A star of TCP connections around rank 0: everyone's wishes are OR-ed there."""

    def __init__(self, place, attempt):
        self.place = place
        if place.size == 1:
            return
        if place.rank == 0:
            server = socket.create_server(("127.0.0.1", 0))
            attempt.publish("127.0.0.1", server.getsockname()[1], secrets.token_hex(8))
            server.settimeout(60)
            self.ends = [server.accept()[0] for _ in range(place.size - 1)]
        else:
            address, port, _ = attempt.find(60)
            self.ends = [socket.create_connection((address, port), timeout=60)]
        for end in self.ends:
            end.settimeout(60)

    def agree(self, wish):
        if self.place.size == 1:
            return wish
        try:
            if self.place.rank == 0:
                for end in self.ends:
                    wish |= self._receive(end)
                for end in self.ends:
                    end.sendall(bytes([wish]))
            else:
                self.ends[0].sendall(bytes([wish]))
                wish = self._receive(self.ends[0])
        except OSError as error:
            raise LostPeers(f"rank {self.place.rank}: {error}") from error
        return Wish(wish)

    @staticmethod
    def _receive(end):
        got = end.recv(1)
        if not got:
            raise LostPeers("a peer closed its connection")
        return got[0]


def save(run, attempt, step, digest):
    """A whole checkpoint in the trainer's layout: files, a manifest with sizes and hashes, renamed last."""
    target = run.checkpoints / f"step-{step:08d}"
    if target.exists():
        return
    attempt.check()
    run.checkpoints.mkdir(exist_ok=True)
    aside = run.checkpoints / f".step-{step:08d}.{secrets.token_hex(4)}.tmp"
    aside.mkdir()
    content = json.dumps({"step": step, "digest": digest}).encode()
    files.write_bytes(aside / "state.json", content)
    manifest = {"state.json": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    files.write_json(aside / "manifest.json", {"files": manifest})
    aside.rename(target)
    files.fsync_folder(run.checkpoints)
    attempt.event("checkpoint", writer="rank-0", step=step)


def newest(run):
    """The step of the newest checkpoint, and the digest of all steps until then."""
    steps = sorted(int(path.name.removeprefix("step-")) for path in run.checkpoints.glob("step-*"))
    if not steps:
        return 0, ""
    state = run.checkpoints / f"step-{steps[-1]:08d}" / "state.json"
    return steps[-1], json.loads(state.read_text())["digest"]


def applies(entry, place, attempt, step):
    if not entry:
        return False
    if "at" in entry:
        steps = entry["at"][attempt.number - 1 : attempt.number]
    else:
        steps = [entry.get("step", 0)]
    here = entry.get("rank", 0) == place.rank and step in steps
    return here and applies_to_attempt(entry, attempt)


def applies_to_attempt(entry, attempt):
    return entry is not None and attempt.number in entry.get("attempts", [attempt.number])


def is_deaf(entry, attempt, heard):
    return applies_to_attempt(entry, attempt) and entry.get("until") not in heard


def misbehave(orders, place, attempt, step):
    if applies(orders.get("crash"), place, attempt, step):
        os._exit(1)
    if applies(orders.get("hang"), place, attempt, step):
        while True:
            time.sleep(1)
    if step == orders.get("waits", {}).get("step"):
        while not os.path.exists(orders["waits"]["file"]):
            time.sleep(0.05)
    if applies(orders.get("eats"), place, attempt, step):
        hoard = []
        while 50 * len(hoard) < orders["eats"]["megabytes"]:
            hoard.append(b"x" * 50_000_000)
            nap(0.2)
    if applies(orders.get("raises"), place, attempt, step):
        name = orders["raises"]["error"]
        raise FAILURES[name] if name in FAILURES else getattr(builtins, name)("on purpose")


def nap(seconds):
    """Sleep as an import does: signals do not shorten it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(0.05, max(0.0, end - time.monotonic())))


def train(run, attempt, place, stop):
    orders, pulse = json.loads(os.environ.get("TRAINEE", "{}")), Pulse()
    with contextlib.ExitStack() as inside:
        if "stalled_after" in orders:
            inside.enter_context(Watchdog(pulse, attempt, place.rank, place.size, orders["stalled_after"]))
        return steps(run, attempt, place, stop, orders, pulse)


def steps(run, attempt, place, stop, orders, pulse):
    nap(orders.get("imports", 0))
    heard = set()
    if orders.get("deaf"):
        signal.signal(signal.SIGTERM, lambda number, frame: (stop.request("TERM"), heard.add("SIGTERM")))
    peers = Peers(place, attempt)
    step, digest = newest(run)
    attempt.step = step
    if place.rank == 0:
        attempt.event("resume", writer="rank-0", step=step)
        for leftover in run.checkpoints.glob(".step-*.tmp"):  # of an attempt that was killed
            shutil.rmtree(leftover)
    last = orders.get("steps", 20)
    every = orders.get("save_every", 5)
    while step < last:
        pulse.fetch()
        pulse.begin(FEATURES)
        misbehave(orders, place, attempt, step)
        nap(orders.get("seconds", 0.1))
        pulse.stepped()
        step += 1
        digest = hashlib.sha256(f"{digest} {step}".encode()).hexdigest()  # shows a step left out or repeated
        attempt.step = step
        attempt.samples(place.rank, [{"step": step, "slot": place.rank, "shard": "s", "key": str(step)}])
        if place.rank == 0:
            attempt.metrics({"step": step, "loss": int(digest[:8], 16), "samples_per_second": 10.0})
        with pulse.with_others():
            agreed = peers.agree(stop.wishes())
        if agreed & Wish.STOP and not is_deaf(orders.get("deaf"), attempt, heard):
            if place.rank == 0:
                nap(orders.get("save_seconds", 0))
                save(run, attempt, step, digest)
            peers.agree(Wish.NONE)
            return Outcome.STOPPED
        if place.rank == 0 and step % every == 0:
            if "evaluation" in orders:
                evaluations.owe(attempt, step)
            save(run, attempt, step, digest)
    if place.rank == 0:
        save(run, attempt, step, digest)
    peers.agree(Wish.NONE)
    return Outcome.FINISHED


def evaluate(run, attempt, place, stop):
    """An evaluation by a job of its own, without torch: `evaluation` of $TRAINEE has its `seconds` (0.1)."""
    orders = json.loads(os.environ.get("TRAINEE", "{}")).get("evaluation", {})
    owed = evaluations.of_job(run)
    attempt.step = owed.step
    if orders.get("fails"):
        raise DataError("shard 00007.tar changed")
    end = time.monotonic() + orders.get("seconds", 0.1)
    while time.monotonic() < end:
        time.sleep(0.05)
        if stop.requested:
            return Outcome.STOPPED
    attempt.check()
    metrics = {"val/t2i_r1": 1 / owed.step}
    about = {"step": owed.step, "attempt": evaluations.attempt_of(owed), "job": attempt.job, "ema": False}
    owed.settle({**about, "metrics": metrics}, {"sets": {}})
    return Outcome.FINISHED
