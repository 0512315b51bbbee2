"""What a preemption leaves of time, and whether a save fits into it. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipcluster.check.plain import Findings

if TYPE_CHECKING:
    from jobs.check.known import Known
    from tools.slurm import Partition

OFF = ("OFF", "DISABLED")  # modes of preemption
NO_PLUGIN = ("preempt/none", "(null)")  # types of preemption


@dataclass(frozen=True)
class Saving:
    """How long a step and a save take, in seconds, and how that is known."""

    save: float
    step: float
    how: str


def compare(part: Partition | None, known: Known, grace: float, saving: Saving | None) -> Findings:
    """Facts about preemption in a partition; `grace`: seconds from the signal to the kill."""
    found = Findings()
    preempted = True  # as long as nobody says otherwise
    if known.config is not None:
        preempted = _describe(part, known.config, found)
    elif "config" in known.silent:
        found.unchecked.append(f"preemption ({known.silent['config']})")
    if saving is None:
        return found
    step = f" and a step {saving.step:.1f} s" if saving.step else ""
    text = f"a save takes {saving.save:.1f} s{step} ({saving.how})"
    if preempted:
        text += f"; a preemption leaves {grace:g} s"
    if not preempted or saving.save + saving.step <= grace:
        found.summary.append(f"saves: {text}")
    else:
        found.warnings.append(
            f"cluster.grace: {text}, so that it loses the steps since the last checkpoint; save more often "
            "(checkpoint.every), or ask the site for a longer GraceTime and KillWait"
        )
    return found


def _describe(part: Partition | None, config: Mapping[str, str], found: Findings) -> bool:
    """Say what a preemption does; whether jobs of the partition can be preempted."""
    mode = (part.preempt_mode if part else "") or config.get("PreemptMode", "unknown")
    grace = f", GraceTime {part.grace_seconds} s" if part else ""
    requeue = config.get("JobRequeue", "1")
    asked = " (jobs are submitted with --requeue)" if requeue == "0" else ""
    found.summary.append(
        f"preemption: PreemptMode={mode}{grace}, KillWait {config.get('KillWait', 'unknown')}, "
        f"JobRequeue={requeue}{asked}"
    )
    if any(word in mode for word in OFF) or config.get("PreemptType") in NO_PLUGIN:
        return False
    if "CANCEL" in mode and part and not part.grace_seconds:
        found.warnings.append(
            f"cluster.partition: jobs in partition {part.name} are cancelled at a preemption "
            "(PreemptMode=CANCEL, GraceTime 0): submit the run again after each; it resumes from its last "
            "checkpoint"
        )
    if "SUSPEND" in mode:
        found.warnings.append(
            "cluster.partition: jobs are suspended at a preemption (PreemptMode=SUSPEND): ranks keep their "
            "memory, and those of several nodes may lose each other"
        )
    return True
