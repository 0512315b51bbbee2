"""Where the time of a run goes: everything is accounted for, and steps done again are lost."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcluster.runs.files import read_lines
from jobs.accounting import ALLOCATED, KINDS, Told, accounted, device_seconds, goodput, told_by
from jobs.endings import history

BEGIN = 1_790_000_000.0


def event(kind, at, **fields):
    return {"event": kind, "time": BEGIN + at, **fields}


def spent(at, step, **seconds):
    return event("spent", at, step=step, seconds=seconds)


def verdict(at, ending, kind="requeue", **fields):
    return event(kind, at, ending=ending, **fields)


def told(number, began, *events, ranks=1, lines=(), job="17"):
    return Told(number, job, BEGIN + began, sorted(events, key=lambda one: one["time"]), ranks, lines)


def line(at, step):
    return {"step": step, "time": BEGIN + at}


def nonzero(account):
    return {kind: pytest.approx(seconds) for kind, seconds in account.spent.items() if seconds > 1e-9}


def test_what_rank_0_measured_is_what_counts():
    (one,) = accounted(
        [
            told(
                1,
                0,
                spent(110, 80, start=5.0, rehearsal=3.0, data=10.0, train=72.0),
                spent(200, 150, start=5.0, rehearsal=3.0, data=12.0, train=135.0, evaluate=20.0, save=5.0),
                event("stop", 200, step=150),
                verdict(203, "preempted"),
            )
        ],
        {"17": BEGIN - 30},
    )
    # the first batch was waited for from second 20 on
    parts = {"start": 25, "rehearsal": 3, "data": 12, "train": 135, "evaluate": 20, "save": 5, "end": 3}
    assert nonzero(one) == {"queue": 30, **parts}
    assert (one.first_step, one.last_step, one.lost_steps, one.ending) == (0, 150, 0, "preempted")
    assert one.seconds == pytest.approx(203)


def test_what_a_crash_had_not_saved_is_lost_and_a_requeue_is_no_first_wait():
    first = told(
        1, 0, spent(60, 40, train=50.0), verdict(100, "crashed", reason="n1 died"), lines=[line(88, 66)]
    )
    second = told(2, 130, event("resume", 140, step=40), spent(200, 90, train=55.0, data=5.0), ranks=2)
    accounts = accounted([first, second], {"17": BEGIN - 5}, now=BEGIN + 210)
    assert nonzero(accounts[0]) == {"queue": 5, "start": 10, "train": 50, "lost": 40}
    assert (accounts[0].lost_steps, accounts[0].last_step) == (26, 66)
    assert nonzero(accounts[1]) == {"requeue": 30, "start": 10, "train": 65, "data": 5}
    devices = device_seconds(accounts)
    assert devices["train"] == pytest.approx(50 + 2 * 65)
    assert goodput(devices) == pytest.approx(180 / 260)


def test_an_older_checkpoint_takes_back_more_than_one_attempt():
    """The third attempt finds the checkpoints of steps 40 and 60 broken, and resumes from step 20."""
    first = told(1, 0, spent(20, 20, train=20.0), spent(40, 40, train=40.0), verdict(40, "preempted"))
    second = told(2, 50, event("resume", 50, step=40), spent(70, 60, train=20.0), verdict(75, "crashed"))
    third = told(3, 80, event("resume", 80, step=20), spent(90, 30, train=10.0))
    one, two, three = accounted([first, second, third], now=BEGIN + 90)
    assert nonzero(one) == {"train": 20, "lost": 20}
    assert nonzero(two) == {"requeue": 10, "lost": 25}
    assert nonzero(three) == {"requeue": 5, "train": 10}
    assert [one.lost_steps, two.lost_steps, three.lost_steps] == [20, 20, 0]


def test_a_roll_back_takes_the_steps_of_its_own_attempt_back():
    (one,) = accounted(
        [
            told(
                1,
                0,
                spent(30, 30, train=30.0),
                spent(50, 50, train=50.0),
                event("roll_back", 52, step=30),
                spent(60, 38, train=58.0, start=2.0),
                event("finish", 60, step=38),
                verdict(61, "finished", "finish"),
            )
        ]
    )
    assert nonzero(one) == {"train": 38, "lost": 20, "start": 2, "end": 1}
    assert one.lost_steps == 20


def test_a_run_that_is_to_resume_from_an_older_step_has_lost_what_came_after():
    attempt = told(1, 0, spent(30, 30, train=30.0), spent(50, 50, train=50.0), verdict(50, "crashed"))
    assert accounted([attempt])[0].spent["lost"] == 0
    (one,) = accounted([attempt], resumes_at=30)
    assert (one.spent["train"], one.spent["lost"], one.lost_steps) == (30, 20, 20)


def test_standing_still_is_a_kind_of_its_own():
    (one,) = accounted(
        [
            told(
                1,
                0,
                spent(10, 10, train=10.0),
                event("stalled", 60, step=12, ranks=[1], seconds=48.0),
                verdict(70, "crashed"),
            )
        ]
    )
    assert nonzero(one) == {"train": 10, "stalled": 58, "lost": 2}, "until the attempt ended"
    (one,) = accounted(
        [told(1, 0, event("stalled", 60, step=12, seconds=48.0), spent(100, 60, train=100.0))],
        now=BEGIN + 100,
    )
    assert nonzero(one) == {"train": 52, "stalled": 48}


def test_without_measurements_the_other_events_tell():
    (one,) = accounted(
        [
            told(
                1,
                0,
                event("phase", 12, phase="first batch"),
                event("evaluation", 40, step=20, seconds=8.0),
                event("checkpoint", 50, step=30, seconds=1.0),
                event("stop_requested", 60, step=38),
                event("stop", 63, step=38),
                verdict(64, "preempted"),
            )
        ]
    )
    assert nonzero(one) == {"start": 12, "evaluate": 8, "train": 40, "end": 4}
    (one,) = accounted([told(1, 0, event("phase", 5, phase="data"), verdict(40, "crashed"))])
    assert nonzero(one) == {"start": 40}


def test_time_before_a_run_is_submitted_again_is_no_queue():
    first = told(1, 0, verdict(10, "failed", "fail", reason="disk full"))
    submitted = {"17": BEGIN - 5, "18": BEGIN + 900}
    before, after = accounted([first, told(2, 1000, job="18")], submitted, now=BEGIN + 1010)
    assert (before.spent["queue"], before.reason) == (5, "disk full")
    assert (after.spent["queue"], after.spent["requeue"], after.idle) == (100, 0, 890)
    _, by_hand = accounted([first, told(2, 1000, job="local-n1-2-3")], submitted, now=BEGIN + 1010)
    assert (by_hand.spent["queue"], by_hand.spent["requeue"], by_hand.idle) == (0, 0, 990)
    submitted["18"] = BEGIN + 1002  # by the clock of the machine it was submitted on
    _, after = accounted([first, told(2, 1000, job="18")], submitted, now=BEGIN + 1010)
    assert (after.spent["queue"], after.spent["requeue"]) == (0, 0)


def test_an_attempt_is_over_once_the_next_has_begun():
    """The node of the first was lost: its ranks train on and write, while the second runs elsewhere."""
    first = told(1, 0, spent(20, 20, train=20.0), spent(60, 60, train=60.0), lines=[line(70, 70)])
    second = told(2, 50, event("resume", 52, step=20), spent(60, 28, train=8.0))
    one, two = accounted([first, second], now=BEGIN + 60)
    assert (one.seconds, two.seconds, two.spent["requeue"]) == (50, 10, 0)
    assert one.spent["train"] + one.spent["lost"] == pytest.approx(50)
    one, two = accounted([first, told(2, -30, spent(60, 80, train=60.0))], now=BEGIN + 60)
    assert one.seconds == 70, "a clock that is behind by minutes says nothing about the end of another"


def test_what_ranks_of_a_lost_node_write_after_the_verdict_is_nobodys():
    lost = told(
        1, 0, spent(40, 30, train=30.0), verdict(42, "requeued already", "note"), spent(60, 50, train=50.0)
    )
    late = spent(400, 380, train=380.0, start=20.0), event("finish", 400, step=380)
    lost = replace(lost, events=[*lost.events, *late], lines=[line(390, 370)])
    (one,) = accounted([lost], resumes_at=30)
    assert nonzero(one) == {"start": 10, "train": 30, "lost": 2}
    assert (one.last_step, one.lost_steps) == (380, 0)


def test_ranks_that_outlive_rank_0_hold_the_allocation(run):
    attempt = run.claim("17", host="n1", still_running=lambda job: False)
    attempt.event("resume", writer="rank-0", step=0)
    attempt.event("fail", writer="rank-1", outcome="lost_peers", code=87)
    (last,) = (line["time"] for line in read_lines(attempt.path / "events-rank-1.jsonl"))
    assert told_by(attempt).others == last
    (one,) = accounted([replace(told_by(attempt), others=last + 9)])
    assert one.ended == pytest.approx(last + 9)
    attempt.event("requeue", writer=history.WRITER, ending="crashed")
    assert told_by(attempt).others is None


def test_a_node_that_died_before_its_ranks_recorded_anything_was_allocated_until_the_claim(run):
    attempt = run.claim("17", host="n1", still_running=lambda job: False, began=time.time() - 5.0)
    claim = attempt.claim()
    (one,) = accounted([told_by(attempt)], {})
    assert nonzero(one) == {"start": claim["time"] - claim["began"]}
    assert one.spent["start"] > 4.9  # claims tell milliseconds


def test_it_is_read_from_the_folder(run):
    attempt = run.claim("17", host="n1", still_running=lambda job: False)
    for rank in (0, 2):  # rank 1 has not come to it
        attempt.event("start", writer=f"rank-{rank}", rank=rank)
    attempt.step = 4
    attempt.event("spent", writer="rank-0", seconds={"train": 0.5})
    attempt.event("requeue", writer=history.WRITER, ending="preempted", code=85)
    (attempt.path / "stalled").mkdir()  # the watchdog's: then other ranks' files are read too
    attempt.event("stalled", writer="rank-2", ranks=[1], seconds=9.0)
    attempt.metrics({"step": 3, "loss": 1.0, **{f"set/figure_{n}": 0.123456789 for n in range(400)}})
    found = told_by(attempt)
    assert (found.ranks, found.job, found.last_line["step"]) == (3, "17", 3)
    assert [one["event"] for one in found.events] == ["start", "spent", "requeue", "stalled"]
    (one,) = accounted([found])
    assert (one.ranks, one.last_step, one.ending) == (3, 4, "preempted")


@dataclass
class Simulated:
    """A training by a clock that is told: what it records, and what truly became of each second."""

    began: float
    first: int
    number: int
    clock: float = 0.0
    events: list = field(default_factory=list)
    measured: dict = field(default_factory=dict)
    truth: list = field(default_factory=list)  # (kind, step or None, seconds)
    step: int = 0
    lines: list = field(default_factory=list)

    def passes(self, kind, seconds, step=None, *, measured=True):
        self.clock += seconds
        self.truth.append((kind, step, seconds))
        if measured:
            self.measured[kind] = self.measured.get(kind, 0.0) + seconds

    def records(self):
        self.events.append(spent(self.clock, self.step, **self.measured))


seconds = st.integers(0, 30_000).map(lambda milliseconds: milliseconds / 1000)
things = st.lists(
    st.tuples(st.sampled_from(["step", "step", "step", "save", "evaluate"]), seconds), max_size=12
)
plans = st.lists(
    st.tuples(things, st.sampled_from(["stop", "crash", "killed at the start"]), seconds), max_size=4
)


def lived_through(plan):
    """The attempts of a plan as they record themselves, and the truth about every second."""
    attempts, clock, saved = [], 0.0, 0
    for number, (doings, ending, delay) in enumerate(plan, 1):
        one = Simulated(clock, saved, number, clock=clock, step=saved)
        one.passes("start", delay, measured=False)
        if ending != "killed at the start":
            one.events.append(event("resume", one.clock, step=saved))
            one.passes("start", 1.0)
            for kind, taken in doings:
                if kind == "step":
                    one.passes("data", taken / 4, one.step + 1)
                    one.passes("train", taken, one.step + 1)
                    one.step += 1
                    one.lines.append(line(one.clock, one.step))
                    if len(one.lines) == 1:
                        one.records()
                else:
                    one.passes(kind, taken)
                    one.records()
                    saved = one.step if kind == "save" else saved
            if ending == "stop":
                one.passes("save", 2.0)
                one.records()
                saved = one.step
                one.events.append(event("stop", one.clock, step=one.step))
                one.passes("end", delay / 3, measured=False)
            elif one.events[-1]["event"] == "spent" or one.lines:
                one.passes("lost", delay / 2, measured=False)
        one.events.append(verdict(one.clock, "crashed" if ending == "crash" else "preempted"))
        attempts.append(one)
        clock = one.clock + 7.0
    return attempts, saved


def truly(attempts, saved):
    """Seconds by kind: a step counts where it was done last, and was saved."""
    last = {step: one.number for one in attempts for kind, step, _ in one.truth if step is not None}
    sums = dict.fromkeys(ALLOCATED, 0.0)
    for one in attempts:
        for kind, step, taken in one.truth:
            lost = step is not None and (step > saved or last[step] != one.number)
            sums["lost" if lost else kind] += taken
    return sums


@settings(max_examples=60)
@given(plans)
def test_every_second_is_accounted_for_as_what_it_was(plan):
    attempts, saved = lived_through(plan)
    accounts = accounted(
        [told(one.number, one.began, *one.events, lines=one.lines[-3:]) for one in attempts], resumes_at=saved
    )
    for one, account in zip(attempts, accounts, strict=True):
        assert account.seconds == pytest.approx(one.clock - one.began, abs=1e-4)
        assert min(account.spent.values()) >= -1e-6
        assert account.spent.keys() == KINDS.keys()
    true, found = truly(attempts, saved), device_seconds(accounts)
    allocated = sum(true.values())
    for kind in ALLOCATED:
        assert found[kind] == pytest.approx(true[kind], abs=1e-4), kind
    share = goodput(found)
    assert share is None or share == pytest.approx(true["train"] / allocated, abs=1e-4)


@settings(max_examples=30)
@given(plans, st.lists(st.tuples(st.floats(-5, 5), st.integers(-3, 60)), max_size=6))
def test_clocks_that_jump_and_records_out_of_order_leave_the_sum_whole(plan, jumps):
    attempts, saved = lived_through(plan)
    read = []
    for one in attempts:
        events = [dict(entry) for entry in one.events]
        for entry, (shift, step) in zip(events, jumps, strict=False):
            entry["time"] += shift
            entry["step"] = step
        read.append(told(one.number, one.began, *events))
    for account in accounted(read, resumes_at=saved):
        assert account.seconds == pytest.approx(account.ended - account.began, abs=1e-4)
        assert min(account.spent.values()) >= -1e-6
