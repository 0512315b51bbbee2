"""The batch script around submitit's srun line: what runs before the ranks and after them, on the first node.

However the script ends, its EXIT trap decides what follows: by the verdict, a Python process, which prints
the code to leave with; where that cannot run or fails, the shell itself requeues the job, once in a row.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs.folder import Run
from clipcluster.runtime.environment import ATTEMPT, BEGAN, ENDS, GRACE, INTERFACE, LEAD, LOGS
from jobs.endings.local import PICKLE
from jobs.submit import containers
from tools.slurm import LEAVING

TEARDOWN = ["clipcluster_end $?"]  # said after srun too, because a site's line may have replaced the trap
# Bash alone: no interpreter, no code and no run folder may be there. It asks SLURM the questions of the
# verdict's table that need no outcome. What it logs is how it knows that it requeued the job before.
_END = r"""
clipcluster_say() { echo "clipcluster: $*" >&2; }
clipcluster_end() {  # $1: the exit code so far
    trap - EXIT
    trap '' TERM INT  # children get bash's traps reset, but what is ignored stays ignored
    set +eu
    if [ -z "$clipcluster_code" ] && [ -n "$clipcluster_began" ]; then
        clipcluster_code="$(VERDICT "$1")"
    fi
    [ -n "$clipcluster_code" ] || clipcluster_without_verdict "$1"
    [ -z "$clipcluster_watch" ] || clipcluster_last_evaluations
    exit "$clipcluster_code"
}
clipcluster_last_evaluations() {  # of a job that nobody cancelled and that does not come back
    kill "$clipcluster_watch" 2>/dev/null
    [[ $clipcluster_code =~ ^(85|88|130)$ ]] || "${clipcluster_evaluate[@]}" finish </dev/null >&2
}
clipcluster_without_verdict() {  # sets clipcluster_code
    local job=$clipcluster_job restarts=${SLURM_RESTART_COUNT:-0} seen before
    seen="$(scontrol show job "$job" 2>&1)"
    seen="${seen#*$'\n'}" seen="${seen%%Command=*}"  # the job's name and comment may look like fields
    if [[ $seen =~ Restarts=([0-9]+) ]] && ((BASH_REMATCH[1] > restarts)); then
        clipcluster_say "job $job was requeued already"
        clipcluster_code=85
        return
    fi
    if [[ $seen =~ JobState=[A-Z_+,]*(LEAVING) && ! $seen =~ JobState=TIMEOUT|Reason=TimeLimit ]]; then
        clipcluster_say "job $job was cancelled"
        [ ! -d "$clipcluster_marks" ] || echo "$job" >>"$clipcluster_marks/cancelled"
        clipcluster_code=130
        return
    fi
    if [[ $seen != *PreemptTime=[0-9]* ]]; then
        before="$(grep -aE '^clipcluster: (no )?verdict' "$LOGS/${job}_0_log.err")"
        if (($? > 1 && restarts > 0)) || [[ ${before##*$'\n'} == 'clipcluster: no'* ]] ||
            { ! clipcluster_say "no verdict: the script ended with code $1; job $job is requeued once" &&
                ((restarts > 0)); }; then
            clipcluster_say "job $job is not requeued again; submit it again once its environment works"
            clipcluster_code=1
            return
        fi
    fi
    clipcluster_code=85
    for _ in {1..30}; do
        ! scontrol requeue "$job" || return
        sleep 1
    done
    clipcluster_say "SLURM did not requeue job $job"
}
"""


def _end(decide: str) -> list[str]:
    """The lines of `_END`, which call the command `decide`."""
    words = {"LOGS": LOGS, "VERDICT": decide, "LEAVING": "|".join(sorted(LEAVING))}
    text = _END
    for mark, word in words.items():
        text = text.replace(mark, word)
    return text.strip().split("\n")


def setup(
    cluster: Cluster,
    code: str,
    verdict: str,
    *,
    logs: Path,
    marks: str = "''",
    whose: Sequence[str] = (),
    before_ranks: Sequence[str] = (),
) -> list[str]:
    """What a batch script does before srun: from its first line on however it ends, its end is decided.

    `code` and `marks` are folders in words of the shell, which may use what the lines of `whose` set.
    `verdict` are the words of the Python command that decides (it is given srun's exit code and prints the
    script's), called once srun was reached. A line of `before_ranks` may set `clipcluster_code`: the script
    then leaves with that code, undecided. It may read `clipcluster_job`, the job as SLURM is told it.
    `logs` holds submitit's files; in `marks` a cancelled job is marked where no verdict can do it.
    """
    decide = f"{shlex.quote(sys.executable)} {verdict}"
    return [
        "trap 'clipcluster_end $?' EXIT",
        "trap : TERM  # outlive the ranks, so that their end is decided",
        f'export {BEGAN}="${{EPOCHREALTIME/,/.}}"  # some locales write a comma; bash before 5 has none',
        "clipcluster_code= clipcluster_began= clipcluster_watch=",
        *whose,
        f"clipcluster_marks={marks}",
        'clipcluster_job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"',
        'clipcluster_job="${clipcluster_job:-$SLURM_JOB_ID}"  # as scontrol requeue must be told it',
        f"export {LOGS}={shlex.quote(str(logs))}",
        *_end(decide),
        *(f"export {name}={shlex.quote(value)}" for name, value in environment(cluster).items()),
        *cluster.setup,
        f"cd {code} || exit",
        'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"',
        *containers.lines(cluster, environment(cluster)),
        *before_ranks,
        "clipcluster_began=1",
    ]


def of_runs(
    cluster: Cluster,
    runs: Sequence[tuple[Run, Path]],
    *,
    logs: Path,
    lead: int,
    grace: float,
    used: Callable[[int], int],
    evaluations: bool = False,
) -> list[str]:
    """What the batch script of a run does before srun: it claims an attempt, and says what the ranks need.

    `runs`: each with the folder of its code; of several, the members of an array, each task takes one.
    Where the run is finished or cancelled the script leaves with 0; where another job owns it with 88.
    `grace`: seconds from the signal of a preemption to the kill; `lead`: from USR1 to the time limit.
    `used`: of a range of nodes SLURM grants some, of which so many take part; the rest idle. `evaluations`: a
    process beside the ranks starts jobs for those that the training leaves to them.
    """
    folder, python = '"$clipcluster_run"', shlex.quote(sys.executable)
    seconds = cluster.time.minutes * 60
    return setup(
        cluster,
        '"$clipcluster_code_folder"',
        f"-m jobs.endings verdict {folder}",
        logs=logs,
        marks='"$clipcluster_run/marks"',
        whose=_whose(runs),
        before_ranks=[
            f"export {LEAD}={lead}",
            f"export {GRACE}={grace:g}",
            # By this node's clock, SECONDS after the script began; newer versions of SLURM say it by that of
            # their server. What comes first: a job begins before its script, and clocks differ.
            f"clipcluster_ends=$(($(date +%s) - SECONDS + {seconds}))",
            "clipcluster_told=${SLURM_JOB_END_TIME:-0}",
            f"export {ENDS}=$((0 < clipcluster_told && clipcluster_told < clipcluster_ends"
            " ? clipcluster_told : clipcluster_ends))",
            f'pickle="${LOGS}/${{clipcluster_job}}_submitted.pkl"',
            # submitit names it after sbatch: a submitter that dies in between leaves it without its name
            f'[ -e "$pickle" ] || cp "$clipcluster_run/submitit/{PICKLE}" "$pickle"',
            *([_evaluate()] if evaluations else []),
            f'{ATTEMPT}="$({python} -m jobs.endings claim {folder})" || {{',
            "    rc=$?",
            "    [ $rc -ne 88 ] || clipcluster_code=88  # another job owns the run",
            "    exit $rc",
            "}",
            f'if [ -z "${ATTEMPT}" ]; then  # finished, or cancelled',
            "    clipcluster_code=0",
            # ranks that finished the run after the verdict, which started none, may have left some
            *(['    "${clipcluster_evaluate[@]}" finish </dev/null >&2'] if evaluations else []),
            "    exit",
            "fi",
            f"export {ATTEMPT}",
            *(_evaluation_lines() if evaluations else []),
            *_node_lines(cluster, used),
        ],
    )


def _whose(runs: Sequence[tuple[Run, Path]]) -> list[str]:
    """Set the run and the folder of its code, of several by the number of the array's task."""
    folders = {"clipcluster_run": [run.path for run, _ in runs]}
    folders["clipcluster_code_folder"] = [code for _, code in runs]
    lines = []
    for name, paths in folders.items():
        words = [shlex.quote(str(path)) for path in paths]
        if len(words) == 1:
            lines.append(f"{name}={words[0]}")
        else:
            lines += [f"{name}s=(", *words, ")", f'{name}="${{{name}s[$SLURM_ARRAY_TASK_ID]}}"']
    return lines


def _evaluate() -> str:
    """Set the command that starts jobs for owed evaluations."""
    words = [sys.executable, "-m", "jobs.submit.evaluations"]
    return f'clipcluster_evaluate=({shlex.join(words)} "$clipcluster_run")'


def _evaluation_lines() -> list[str]:
    """Start jobs for owed evaluations beside the ranks; `clipcluster_end` starts the last ones."""
    return [
        '"${clipcluster_evaluate[@]}" watch "$$" </dev/null >&2 &',
        "clipcluster_watch=$!",
        "disown  # the shell says nothing of its end",
    ]


def _node_lines(cluster: Cluster, used: Callable[[int], int]) -> list[str]:
    """For a range of nodes: tell srun how many of the granted ones take part (it reads these variables)."""
    least, most = cluster.nodes.least, cluster.nodes.most
    if least == most:
        return []
    table = " ".join(f"[{granted}]={used(granted)}" for granted in range(least, most + 1))
    return [
        f"used=({table})",
        'export SLURM_NNODES="${used[$SLURM_JOB_NUM_NODES]}"',
        "export SLURM_JOB_NUM_NODES=$SLURM_NNODES",
        f"export SLURM_NTASKS=$((SLURM_NNODES * {cluster.ranks_per_node}))",
        "export SLURM_NPROCS=$SLURM_NTASKS",
    ]


def environment(cluster: Cluster) -> dict[str, str]:
    """The job's variables: nodes may be offline, so nothing is looked for on a hub."""
    interface = {INTERFACE: cluster.interface} if cluster.interface else {}
    return {"HF_HUB_OFFLINE": "1", **interface, **cluster.environment}
