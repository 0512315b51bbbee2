"""The batch script around submitit's srun line: what runs before the ranks and after them, on the first node.

However the script ends, its EXIT trap decides what follows: by the verdict, a Python process, which prints
the code to leave with; where that cannot run or fails, the shell itself requeues the job, once in a row.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from clipcluster.runtime.environment import LOGS

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
    exit "$clipcluster_code"
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
    if [[ $seen == *JobState=* && ! $seen =~ JobState=(RUNNING|TIMEOUT)|Reason=TimeLimit ]]; then
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


def begin(verdict: str, *, logs: Path) -> list[str]:
    """The script's first lines: from here on however it ends, its end is decided.

    `verdict` is the command that decides (it is given srun's exit code and prints the script's); it is called
    once `ranks_begin` was reached. A script that sets `clipcluster_code` leaves with that code, undecided.
    `logs` holds submitit's files. The script may set `clipcluster_marks`, the folder in which a cancelled job
    is marked where no verdict can do it, and may read `clipcluster_job`, the job as SLURM is told it.
    """
    return [
        "trap 'clipcluster_end $?' EXIT",
        "trap : TERM  # outlive the ranks, so that their end is decided",
        "clipcluster_code= clipcluster_began= clipcluster_marks=",
        'clipcluster_job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"',
        'clipcluster_job="${clipcluster_job:-$SLURM_JOB_ID}"  # as scontrol requeue must be told it',
        f"export {LOGS}={shlex.quote(str(logs))}",
        *_END.replace("LOGS", LOGS).replace("VERDICT", verdict).strip().splitlines(),
    ]


def ranks_begin() -> list[str]:
    """The last line before srun."""
    return ["clipcluster_began=1"]


def end() -> list[str]:
    """What follows srun; said here too, because a site's line may have replaced the trap."""
    return ["clipcluster_end $?"]


def exports(environment: Mapping[str, str]) -> list[str]:
    """Lines that set the job's variables."""
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]


def enter(folder: str) -> list[str]:
    """Lines that make a folder of code (a word of the shell, quoted) the job's own."""
    return [f"cd {folder} || exit", 'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"']


def python(*words: str) -> str:
    """A command of the submitting environment's interpreter; `words` are the shell's."""
    return " ".join([shlex.quote(sys.executable), *words])


def claim(run: str, variable: str) -> list[str]:
    """Lines that claim an attempt of the run (a word of the shell) and export its number as `variable`.

    Where the run is finished or cancelled the script leaves with 0; where another job owns it with 88.
    """
    return [
        f'{variable}="$({python("-m", "jobs.endings", "claim", run)})" || {{',
        "    rc=$?",
        "    [ $rc -ne 88 ] || clipcluster_code=88  # another job owns the run",
        "    exit $rc",
        "}",
        f'if [ -z "${variable}" ]; then  # finished, or cancelled',
        "    clipcluster_code=0",
        "    exit",
        "fi",
        f"export {variable}",
    ]


def table(name: str, values: Sequence[object]) -> str:
    """An array of the shell."""
    return f"{name}=({' '.join(shlex.quote(str(value)) for value in values)})"
