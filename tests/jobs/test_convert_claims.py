"""Tasks of an array share a conversion: every shard has one owner, and the last one finishes it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipcluster.data.shards.open import open_folder
from clipcluster.errors import UserError
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs.files import write_json
from clipcluster.runtime.environment import LOGS
from clipcluster.runtime.outcome import Outcome
from clipcluster.runtime.stop import Stop
from jobs.convert import FOLDER, Claims, ConvertJob, ending, failed_jobs, refuse_running, serve, submit
from jobs.convert import _parameters as parameters_of
from tools.convert import convert as conversion
from tools.convert import work as making
from tools.convert.convert import begun, prepare
from tools.convert.plan import Plan, Settings, Shard
from tools.convert.records import Kind, NoOptions, Record, Source
from tools.convert.work import BAD_SAMPLES
from tools.slurm import Slurm

JPEG = b"\xff\xd8\xff\xe0"


class Keys:
    """A split of samples with the given keys."""

    name = ""
    files: dict[str, str] = {}  # noqa: RUF012
    account = None

    def __init__(self, keys: list[str]) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, number: int) -> Record:
        return Record(self._keys[number], JPEG + bytes([number]), ["a caption"])


def shard(number: int) -> Shard:
    return Shard(0, number, 0, 1, f"{number:05d}.tar")


def test_a_claim_has_one_owner_and_outlives_it(tmp_path: Path) -> None:
    first, second = Claims(tmp_path, "7_0"), Claims(tmp_path, "7_1")
    assert first.take(shard(0), 0)
    assert not second.take(shard(0), 0)
    assert Claims(tmp_path, "7_0").take(shard(0), 0), "a requeued task keeps what it claimed"
    assert second.take(shard(1), 0)
    assert second.take(shard(0), 1), "a shard that has to be written again is claimed anew"


def test_a_task_killed_while_it_claims_leaves_the_shard_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)  # between making the file and its being whole
        with pytest.raises(KeyboardInterrupt):
            Claims(tmp_path, "7_0").take(shard(0), 0)
    assert Claims(tmp_path, "7_1").take(shard(0), 0)


@pytest.mark.parametrize("written", [0, 3])
def test_a_repeated_key_in_a_shard_of_a_task_that_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    keys = ["a", "b", "c", "d", "a", "e"]
    kind = Kind("keys", lambda inputs, options: Source([Keys(keys)], []), options=NoOptions)
    monkeypatch.setattr(conversion, "kind_named", lambda name: kind)
    out, settings = tmp_path / "out", Settings(samples_per_shard=2)
    order = ConvertJob("keys", out, [], NoOptions(), settings)
    plan = prepare("keys", out, [], NoOptions(), settings)
    with begun(plan):
        claims = out / FOLDER / "claims"
        claims.mkdir(parents=True)
        making.work(plan, lambda shard: shard.number < written)  # by tasks that have left
    for shard in plan.shards[: max(1, written)]:
        Claims(claims, "7_0").take(shard, 0)
    for task in ("7_1", "7_0"):
        monkeypatch.setenv("SLURM_JOB_ID", task)
        assert serve(order, Stop()) == 0
    assert prepare("keys", out, [], NoOptions(), settings).finished
    assert [open_folder(out).read(position).key for position in range(5)] == ["a", "b", "c", "d", "e"]
    assert '"duplicate key", "number": 4' in (out / BAD_SAMPLES).read_text()


class StoppedAt(Keys):
    """Reading the sample of this number takes until the time is nearly up."""

    def __init__(self, keys: list[str], number: int) -> None:
        super().__init__(keys)
        self._number = number

    def read(self, number: int) -> Record:
        if number == self._number:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.3)
        return super().read(number)


@pytest.mark.parametrize(("at", "code"), [(1, Outcome.ERROR), (3, Outcome.STOPPED)])
def test_a_shard_that_does_not_fit_the_time_is_not_begun_for_ever(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: int,
    code: Outcome,
) -> None:
    split = StoppedAt(["a", "b", "c", "d", "e", "f"], at)
    kind = Kind("keys", lambda inputs, options: Source([split], []), options=NoOptions)
    monkeypatch.setattr(conversion, "kind_named", lambda name: kind)
    monkeypatch.setenv("SLURM_JOB_ID", "7_0")
    out, settings = tmp_path / "out", Settings(samples_per_shard=3)
    with begun(prepare("keys", out, [], NoOptions(), settings)):
        (out / FOLDER / "claims").mkdir(parents=True)
    stop, before = Stop(), signal.getsignal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, stop._note)
    try:
        assert serve(ConvertJob("keys", out, [], NoOptions(), settings), stop) == code
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ("cluster.time" in capsys.readouterr().out) == (code == Outcome.ERROR)
    assert not list(out.rglob("*.part"))


def test_a_task_that_comes_second_writes_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Kind("keys", lambda inputs, options: Source([Keys(["a", "b", "c"])], []), options=NoOptions)
    monkeypatch.setattr(conversion, "kind_named", lambda name: kind)
    monkeypatch.setenv("SLURM_JOB_ID", "7_0")
    out, settings, work = tmp_path / "out", Settings(samples_per_shard=1), making.work
    with begun(prepare("keys", out, [], NoOptions(), settings)):
        (out / FOLDER / "claims").mkdir(parents=True)
    written: list[int] = []

    def work_while_another_finishes(plan: Plan, claim: Callable[[Shard], bool], *more: Any) -> None:
        work(plan, claim, *more)
        assert making.finish(plan)
        written.extend(path.stat().st_mtime_ns for path in sorted(out.glob("*.tar")))

    monkeypatch.setattr(making, "work", work_while_another_finishes)
    assert serve(ConvertJob("keys", out, [], NoOptions(), settings), Stop()) == 0
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))] == written
    assert not (out / making.STATE).exists()


def test_a_task_writes_nothing_again_once_another_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Kind("keys", lambda inputs, options: Source([Keys(["a", "b", "c"])], []), options=NoOptions)
    monkeypatch.setattr(conversion, "kind_named", lambda name: kind)
    monkeypatch.setenv("SLURM_JOB_ID", "7_0")
    out, settings, finish = tmp_path / "out", Settings(samples_per_shard=1), making.finish
    plan = prepare("keys", out, [], NoOptions(), settings)
    with begun(plan):
        (out / FOLDER / "claims").mkdir(parents=True)
    Claims(out / FOLDER / "claims", "7_1").take(plan.shards[2], 0)

    def finish_before_another_does(plan: Plan) -> bool:
        monkeypatch.setattr(making, "finish", finish)
        done = finish(plan)
        making.work(plan, lambda shard: True)  # the other task writes its shard, the last one
        assert finish(plan)
        return done

    monkeypatch.setattr(making, "finish", finish_before_another_does)
    assert serve(ConvertJob("keys", out, [], NoOptions(), settings), Stop()) == 0
    dataset = open_folder(out)
    assert dataset.modified_shards() == {}
    assert not (out / making.STATE).exists()


SCONTROL = """#!/bin/bash
echo "$1" >> {folder}/calls
if [ "$1" = show ]; then
    echo "JobId=7 ArrayJobId=7 ArrayTaskId=0 JobName=c"
    echo "   JobState={state} Reason={reason} Restarts={restarts} PreemptTime={preempt}"
elif [ "$(grep -c requeue {folder}/calls)" -le {refusals} ]; then
    echo "Requested operation is presently disabled" >&2
    exit 1
fi
"""


@pytest.mark.parametrize(
    ("code", "seen", "requeued"),
    [
        (85, {"refusals": 1}, True),  # asked to stop
        (137, {}, True),  # crashed
        (137, {"before": 3, "endings": ["crashed"] * 3}, False),  # crashed again and again
        (137, {"before": 3, "endings": ["preempted", "crashed", "preempted"]}, True),
        (137, {"before": 3}, False),  # without a log the restarts count
        (85, {"before": 7}, True),
        (143, {"preempt": "2026-11-21T02:23:32", "before": 7}, True),
        (143, {"state": "COMPLETING", "reason": "TimeLimit", "before": 7}, True),
        (143, {"state": "COMPLETING"}, False),  # scancel
        (143, {"restarts": 1}, False),  # requeued by somebody else
        (0, {}, False),
        (2, {}, False),
    ],
)
def test_what_follows_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, seen: dict[str, Any], requeued: bool
) -> None:
    answer = {"state": "RUNNING", "reason": "None", "preempt": "None", "before": 0, "refusals": 0, **seen}
    program = tmp_path / "scontrol"
    program.write_text(SCONTROL.format(folder=tmp_path, **{"restarts": answer["before"], **answer}))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(answer["before"]))
    out, logs = tmp_path / "out", tmp_path / "out" / FOLDER / "submitit"
    logs.mkdir(parents=True)
    write_json(logs.parent / "job.json", {"jobs": ["7_0", "7_1"]})
    (logs.parent / "claims").mkdir()
    assert Claims(logs.parent / "claims", "7_0").take(shard(0), 0)
    monkeypatch.setenv(LOGS, str(logs))
    lines = [
        f"clipcluster: verdict on job 7_0, whose task exited with code 1: {each} -> requeue\n"
        for each in answer.get("endings", [])
    ]
    if lines:
        (logs / "7_0_0_log.err").write_text("".join(lines))
    assert ending(code, Slurm()) == code
    comes_back = requeued or "restarts" in seen  # or somebody requeued it
    assert failed_jobs(out) == ([] if comes_back or code == 0 else ["7_0"])
    calls = (tmp_path / "calls").read_text().split() if code not in (0, 2) else []
    assert calls.count("requeue") == requeued + answer["refusals"]


def test_a_task_that_failed_before_it_claimed_a_shard_holds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / FOLDER
    (folder / "claims").mkdir(parents=True)
    write_json(folder / "job.json", {"jobs": ["7"]})
    monkeypatch.setenv(LOGS, str(folder / "submitit"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert Claims(folder / "claims", "8").take(shard(0), 0)
    assert ending(2, Slurm()) == 2
    assert failed_jobs(tmp_path) == []


def batch_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> subprocess.CompletedProcess[str]:
    """The batch script of a task that leaves with `code`, run by bash."""
    from submitit.slurm.slurm import _make_sbatch_string

    (tmp_path / FOLDER / "submitit").mkdir(parents=True)
    chosen = parameters_of(Cluster(gpus_per_node=0), tmp_path, Path(__file__).resolve().parents[2])
    script = _make_sbatch_string(command="task", folder=tmp_path, **chosen)
    for name, text in {
        "srun": f"#!/bin/sh\nexit {code}\n",
        "scontrol": "#!/bin/sh\necho $1 JobState=RUNNING\n",
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True)


@pytest.mark.parametrize("code", [0, 2])
def test_a_task_that_is_done_is_not_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    done = batch_script(tmp_path, monkeypatch, code)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_a_node_without_the_interpreter_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/bin/python")
    done = batch_script(tmp_path, monkeypatch, 127)
    assert done.returncode == Outcome.STOPPED
    assert "no verdict: the script ended with code 127; job 7 is requeued once" in done.stderr
    assert "requeue" in done.stdout


FAILS = """
import sys
from pathlib import Path
from jobs.convert import ConvertJob

ConvertJob("no such kind", Path(sys.argv[1]), [], None, None)()
"""


def test_a_full_disk_under_the_log_changes_no_code(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", FAILS, str(tmp_path)], stdout=full, stderr=full)
    assert done.returncode == 2


def queue_shows(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """SLURM's queue shows a job that converts into `out`, once it was asked `after` times."""
    (folder / "squeue").write_text(
        f"#!/bin/sh\necho >> {folder}/asked\n[ $(wc -l < {folder}/asked) -le {after} ] ||"
        f" printf '18_0|RUNNING|low|me|0:01|1:00|N/A|n1|None|convert-out\\037{out}\\n'\n"
    )
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_job_whose_submitter_died_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    (out / FOLDER).mkdir(parents=True)
    queue_shows(tmp_path, out, monkeypatch, after=0)
    refuse_running(out)
    write_json(out / FOLDER / "job.json", {"jobs": []})
    with pytest.raises(UserError, match="scancel 18"):
        refuse_running(out)


def test_of_two_submissions_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Kind("keys", lambda inputs, options: Source([Keys(["a", "b"])], []), options=NoOptions)
    monkeypatch.setattr(conversion, "kind_named", lambda name: kind)
    out = tmp_path / "out"
    order = ConvertJob("keys", out, [], NoOptions(), Settings(samples_per_shard=1))
    with begun(prepare("keys", out, [], NoOptions(), order.settings)):
        (out / FOLDER / "claims").mkdir(parents=True)
    write_json(out / FOLDER / "job.json", {"jobs": ["17_0"]})
    queue_shows(tmp_path, out, monkeypatch, after=1)  # not yet when this submission began
    assert Claims(out / FOLDER / "claims", "18_0").take(shard(0), 0)
    with pytest.raises(UserError, match="18_0 of this conversion is RUNNING"):
        submit(order, Cluster(gpus_per_node=0), 2)
    assert not Claims(out / FOLDER / "claims", "19_0").take(shard(0), 0)


def test_an_output_folder_that_sbatch_would_not_take_as_it_is(tmp_path: Path) -> None:
    order = ConvertJob("keys", tmp_path / "%u", [], NoOptions(), Settings())
    with pytest.raises(UserError, match="%u stands for"):
        submit(order, Cluster(gpus_per_node=0), 2)
    assert not order.out.exists()
