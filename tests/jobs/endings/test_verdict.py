"""The table of endings: each line, their order, and what holds for all facts."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.endings.verdict import Facts, Job, blamed, decide, error_lines, memory_line

RUNNING = Job(running=True)
FINISHED = {"outcome": "finished", "code": 0, "reason": "", "advice": ""}
STOPPED = {"outcome": "stopped", "code": 85, "reason": "SIGTERM", "advice": ""}
FAILED = {
    "outcome": "failed",
    "code": 90,
    "reason": "shard 3 changed",
    "advice": "index it again",
    "rank": 1,
    "host": "n2",
}
STALLED = {"ranks": [1], "nodes": ["n2"], "silent": True, "reason": "no step for 300 s: rank 1 on n2: silent"}

# Every line of the table with facts that fit it, in the table's order. The facts of a line hold whatever the
# lines below it would say, so that joining two lines must give the upper one.
LINES = {
    "superseded": Facts(1, superseded=True),
    "finished": Facts(0, said=FINISHED),
    "cancelled": Facts(85, cancelled=True),
    "told to stop": Facts(85, told="SIGTERM"),
    "requeued already": Facts(85, job=replace(RUNNING, restarts=1)),
    "out of time": Facts(137, job=Job(running=False, time_limit=True)),
    "scancelled": Facts(85, job=Job(running=False)),
    "preempted": Facts(85, job=replace(RUNNING, preempted=True)),
    "stopped": Facts(85, said=STOPPED, job=RUNNING),
    "failed": Facts(90, said=FAILED, job=RUNNING),
    "out of memory": Facts(137, memory="srun: error: n2: task 1: Out Of Memory", started=True, job=RUNNING),
    "stalled": Facts(94, stalled=STALLED, started=True, job=RUNNING),
    "crashed": Facts(1, started=True, job=RUNNING),
    "never started": Facts(1, job=RUNNING),
}
EXPECTED = {
    "superseded": ("leave", 88),
    "finished": ("finish", 0),
    "cancelled": ("cancel", 130),
    "told to stop": ("stop", 85),
    "requeued already": ("note", 85),
    "out of time": ("requeue", 85),
    "scancelled": ("cancel", 130),
    "preempted": ("requeue", 85),
    "stopped": ("requeue", 85),
    "failed": ("fail", 90),
    "out of memory": ("fail", 91),
    "stalled": ("requeue", 85),
    "crashed": ("requeue", 85),
    "never started": ("requeue", 85),
}


@pytest.mark.parametrize("line", LINES)
def test_each_line(line):
    verdict = decide(LINES[line])
    assert (verdict.action, verdict.code) == EXPECTED[line]
    assert verdict.ending == {"scancelled": "cancelled"}.get(line, line)


def joined(upper, lower):
    """Facts that fit both lines."""
    empty = Facts(1)
    changed = {
        name: getattr(upper, name) for name in vars(empty) if getattr(upper, name) != getattr(empty, name)
    }
    if upper.job and lower.job:
        jobs = [upper.job, lower.job]
        changed["job"] = Job(
            running=all(job.running for job in jobs),
            time_limit=any(job.time_limit for job in jobs),
            restarts=max(job.restarts for job in jobs),
            preempted=any(job.preempted for job in jobs),
        )
    return replace(lower, **changed)


@pytest.mark.parametrize(
    ("upper", "lower"),
    [(a, b) for i, a in enumerate(LINES) for b in list(LINES)[i + 1 :]],
)
def test_the_upper_line_wins(upper, lower):
    assert decide(joined(LINES[upper], LINES[lower])).action == EXPECTED[upper][0]
    assert decide(joined(LINES[upper], LINES[lower])).ending == decide(LINES[upper]).ending


said = st.none() | st.sampled_from([FINISHED, STOPPED, FAILED])
jobs = st.none() | st.builds(
    Job, st.booleans(), st.booleans(), restarts=st.integers(0, 2), preempted=st.booleans()
)
facts = st.builds(
    Facts,
    st.integers(0, 255),
    superseded=st.booleans(),
    said=said,
    cancelled=st.booleans(),
    told=st.sampled_from(["", "SIGTERM"]),
    job=jobs,
    restart_count=st.integers(0, 2),
    time_nearly_over=st.booleans(),
    started=st.booleans(),
    fruitless=st.integers(0, 5),
    broken_before=st.booleans(),
)


@given(facts)
def test_whatever_is_seen(seen):
    verdict = decide(seen)
    if seen.superseded:
        assert verdict.action == "leave"
        return
    assert (verdict.action == "finish") == (seen.said == FINISHED)
    if verdict.action == "requeue":
        assert not seen.cancelled
        assert not seen.told
        assert not verdict.counts or seen.fruitless < 2
        assert (
            verdict.ending == "preempted" or seen.said != FAILED or seen.job is None or not seen.job.running
        )
    assert verdict.mark == (verdict.action == "cancel" and not seen.cancelled)
    assert verdict.code == 0 or verdict.action != "finish"


@given(facts)
def test_the_ranks_code_alone_decides_nothing(seen):
    verdict, other = decide(seen), decide(replace(seen, code=(seen.code + 1) % 256))
    assert (verdict.action, verdict.ending, verdict.code) == (other.action, other.ending, other.code)


@given(facts)
def test_a_silent_scheduler_leaves_mark_and_outcome(seen):
    verdict = decide(replace(seen, job=None, superseded=False, told=""))
    if seen.cancelled and seen.said != FINISHED:
        assert verdict.action == "cancel"
    elif seen.said is not None:
        assert verdict.action in {"finished": ["finish"], "failed": ["fail"]}.get(
            seen.said["outcome"], ["requeue", "fail"]
        )


@pytest.mark.parametrize("line", ["out of time", "crashed", "never started"])
def test_three_in_a_row_end_the_run(line):
    assert decide(replace(LINES[line], fruitless=1)).action == "requeue"
    verdict = decide(replace(LINES[line], fruitless=2))
    assert (verdict.action, verdict.code) == ("fail", 1)
    assert "3 endings in a row with no newer checkpoint" in verdict.reason
    assert verdict.advice
    survivor = "srun: error: n1: task 0: Exited with exit code 87"
    killed = replace(LINES[line], fruitless=2, errors=[survivor, "srun: error: n2: task 1: Killed"])
    assert "cluster.mem" in decide(killed).advice
    exited = replace(killed, errors=[survivor, "srun: error: n2: task 1: Exited with exit code 1"])
    assert "cluster.mem" not in decide(exited).advice


@pytest.mark.parametrize("line", ["preempted", "stopped", "requeued already"])
def test_what_the_run_is_not_to_blame_for_never_ends_it(line):
    verdict = decide(replace(LINES[line], fruitless=9))
    assert verdict.action == EXPECTED[line][0]
    assert not verdict.counts


def test_the_same_exception_at_the_same_step_twice_in_a_row_ends_the_run():
    shape = {"step": 7, "signature": "RuntimeError: mat1 and mat2 shapes cannot be multiplied"}
    seen = replace(LINES["crashed"], raised=[{"step": 7, "signature": "RuntimeError: rank 2"}, shape])
    assert decide(seen).action == "requeue"
    assert decide(replace(seen, raised_before=[{**shape, "step": 6}])).action == "requeue"
    assert decide(replace(seen, raised_before=[{**shape, "signature": "another"}])).action == "requeue"
    verdict = decide(replace(seen, raised_before=[shape]))
    assert (verdict.action, verdict.ending, verdict.code) == ("fail", "failed", 86)
    assert verdict.reason == f"{shape['signature']} (at step 7, twice in a row)"
    assert verdict.advice
    preempted = replace(seen, raised_before=[shape], job=LINES["preempted"].job)
    assert decide(preempted).ending == "preempted"


def test_a_stop_just_before_the_limit_counts_as_out_of_time():
    assert decide(replace(LINES["stopped"], time_nearly_over=True)).counts
    assert decide(replace(LINES["stopped"], time_nearly_over=True, fruitless=2)).action == "fail"


def test_a_broken_environment_is_tried_once_more():
    verdict = decide(replace(LINES["never started"], broken_before=True, tail="ModuleNotFoundError: jobs"))
    assert (verdict.action, verdict.code) == ("fail", 1)
    assert "ModuleNotFoundError: jobs" in verdict.reason
    assert verdict.advice


def test_a_failure_keeps_its_reason_and_has_an_advice():
    verdict = decide(LINES["failed"])
    assert (verdict.reason, verdict.advice) == ("shard 3 changed (rank 1 on n2)", "index it again")
    for code in (86, 89, 90, 91, 92, 93):
        assert decide(replace(LINES["failed"], said={**FAILED, "code": code, "advice": ""})).advice


@pytest.mark.parametrize(
    "line",
    [
        "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM",
        "slurmstepd: error: Detected 2 oom-kill event(s) in StepId=7.0 cgroup. Some of your processes",
        "slurmstepd-n2: error: StepId=7.0 exceeded memory limit (734003200 > 524288000), being killed",
        "srun: error: n2: tasks 1-3: Out Of Memory",
        "srun: Exceeded job memory limit",
    ],
)
def test_what_slurm_kills_for_its_memory_ends_with_advice(line):
    found = memory_line(f"{SRUN}{line}\nslurmstepd: error: *** STEP 7.0 ON n2 CANCELLED ***\n")
    assert found == line
    verdict = decide(replace(LINES["out of memory"], memory=found, errors=error_lines(SRUN)))
    assert (verdict.reason, verdict.code) == (line, 91)
    assert "cluster.mem" in verdict.advice
    assert memory_line(SRUN) == ""
    assert memory_line("a rank says: Out Of Memory\nTried to allocate: out of memory") == ""


SRUN = """\
clipcluster: attempt 1 of run begins (job 7 on n1)
some warning of a rank
srun: error: n1: task 0: Exited with exit code 87
srun: launch/slurm: _step_signal: Terminating StepId=7.0
srun: error: n[2-3]: tasks 1-2: Killed
"""


def test_blame_falls_on_the_first_that_did_not_survive():
    lines = error_lines(SRUN)
    assert [line.split(": ")[2] for line in lines] == ["n1", "n[2-3]"]
    assert blamed(lines, []) == "n2"
    assert blamed(lines, ["n9"]) == "n9"
    assert blamed(["srun: error: Node failure on n3"], []) == "n3"
    assert blamed([lines[0]], []) is None
    assert blamed([], []) is None


def test_a_stall_blames_the_node_whose_ranks_gave_no_sign_of_life():
    lines = error_lines(SRUN.replace("87", "94"))
    assert blamed(lines[:1], []) is None
    assert blamed(lines, [], STALLED) == "n2"
    assert blamed(lines, ["n9"], STALLED) == "n9"
    assert blamed(lines, [], {**STALLED, "silent": False}) is None  # it waits for a disk: that of all nodes?
    killed = "srun: error: n3: task 4: Killed"
    assert blamed(error_lines(f"srun: error: n1: task 0: Exited with exit code 94\n{killed}"), []) is None
    assert blamed(error_lines(f"{killed}\nsrun: error: n1: task 0: Exited with exit code 85"), []) == "n3"
    assert blamed(lines, [], {**STALLED, "nodes": []}) is None  # all ranks, as by a disk that all use
    assert blamed(lines, [], {**STALLED, "nodes": ["n2", "n3"]}) is None
    assert decide(LINES["stalled"]).reason == STALLED["reason"]
    assert decide(replace(LINES["stalled"], fruitless=2)).action == "fail"
