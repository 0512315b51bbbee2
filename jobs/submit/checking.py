"""The whole check of a recipe: what `clipcluster check` shows, and every submission first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipcluster.check.plain import Checked, Findings
from clipcluster.recipe.load import result_keys
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs import timing
from clipcluster.runs.folder import Run
from clipcluster.runs.sweeps import run_of as _run_of
from clipcluster.text import sized
from jobs.check import cluster as asked
from jobs.check import memory, preemption, storage
from jobs.check.known import ASK_SECONDS, Known, ask
from jobs.submit import executor
from tools.slurm import Partition, Slurm, SlurmRefused, SlurmUnavailable

WIDEST = 14  # subjects of facts are aligned up to so many characters
# What sbatch takes from the environment rather than from the batch script -> the key of `cluster`.
OVERRIDING = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
}
DEEP = "towers, weights, samples, parameters, memory, checkpoint size"


def run_of(checked: Checked, runs: Path) -> Run:
    """The run that a submission of the recipe would start or resume."""
    loaded = checked.loaded
    return _run_of(loaded.recipe.name, loaded.title, result_keys(loaded), runs)


def complete(
    checked: Checked, run: Run, chosen: str, *, assets: Path | None = None, quick: bool, runs: int = 1
) -> None:
    """Add to the plain check what the deep one finds (unless `quick`), and the cluster and the disk.

    chosen: where the run goes: slurm, local or none. assets: folder of what was fetched for the run. runs:
    how many such runs start together.
    """
    if checked.awaited and not quick:
        checked.unchecked.append(f"{DEEP}: what the run starts from is not made yet")
    elif quick:
        checked.unchecked.append(f"{DEEP} (clipcluster check --deep checks them)")
    elif not checked.errors:
        from clipcluster.check import deep

        checked.unchecked.clear()  # it looks at all of that
        checked.add(deep.check(checked.recipe, world_size=checked.world_size, assets=assets))
    cluster = checked.recipe.cluster
    checked.summary.append(executor.devices(cluster, chosen))
    known, part, grace = Known(), None, 0.0
    if chosen == "slurm":
        known, part, grace = _cluster(checked, run)
    elif chosen == "local" and (missing := executor.missing_devices(cluster)):
        checked.warnings.append(missing)
    if taken := checked.figures.get("memory_bytes"):
        nodes = [node for node in known.nodes or () if part and part.name in node.partitions]
        device = memory.device_of(checked.recipe, nodes)
        checked.figures |= {"device_bytes": device.bytes} if device else {}
        checked.add(memory.compare(checked.recipe, checked.world_size, taken, device))
    saving = _disk(checked, run, quick, runs)
    if chosen == "slurm":
        checked.add(preemption.compare(part, known, grace, saving))


def _cluster(checked: Checked, run: Run) -> tuple[Known, Partition | None, float]:
    """Compare the section `cluster` with what SLURM has; returns that, the partition, and the grace time."""
    from jobs.submit import launch, parameters

    loaded = checked.loaded
    cluster, said = of_environment(checked.recipe.cluster, os.environ)
    checked.warnings += said
    with launch.outside_of_jobs():
        slurm = Slurm(timeout=ASK_SECONDS)
    known = ask(slurm)
    found = asked.compare(cluster, known, loaded.place)
    checked.add(found)
    if names := launch.inherited():
        checked.summary.append(f"environment: left out of the job: {', '.join(names)}")
    if known.config is None or known.partitions is None:
        return known, None, parameters.grace_seconds(cluster, None)
    grace = parameters.grace_seconds(cluster, slurm)
    if not checked.errors:
        _expected_start(checked, run, slurm, grace)
    return known, asked.partition_of(cluster, known), grace


def of_environment(cluster: Cluster, environ: Mapping[str, str]) -> tuple[Cluster, list[str]]:
    """The section as sbatch will see it, and a warning for each variable that it prefers to the recipe.

    Inside a job these variables are left out.
    """
    if "SLURM_JOB_ID" in environ:
        return cluster, []
    taken = {key: environ[name] for name, key in OVERRIDING.items() if environ.get(name)}
    said = [
        f"cluster.{key}: sbatch takes {name}={environ[name]} of the environment instead; unset {name}"
        for name, key in OVERRIDING.items()
        if environ.get(name) and getattr(cluster, key) not in (None, environ[name])
    ]
    return cluster.model_copy(update=taken), said


def _expected_start(checked: Checked, run: Run, slurm: Slurm, grace: float) -> None:
    """When the job would start, or why SLURM would refuse it."""
    from jobs.submit import parameters

    flags = parameters.of_run(checked.recipe.cluster, run, run.path / "code", grace=grace)
    try:
        start = slurm.expected_start(*sbatch_arguments(flags))
    except SlurmRefused as refusal:
        checked.errors.append(f"sbatch would refuse the job: {refusal}; change the section cluster")
    except SlurmUnavailable as silence:
        checked.unchecked.append(f"expected start ({silence})")
    else:
        if start is None:
            return
        checked.figures["expected_start"] = start.time.isoformat()
        where = f" on {', '.join(start.nodes)}" if start.nodes else ""
        checked.summary.append(f"start: expected {start.time:%Y-%m-%d %H:%M}{where}, by the queue as it is")


def sbatch_arguments(flags: Mapping[str, Any]) -> list[str]:
    """Parameters for submitit as options of sbatch, without what the script and srun are given."""
    plain = {key: value for key, value in flags.items() if not isinstance(value, list | dict)}
    options = {**plain, **flags.get("additional_parameters", {})}
    return [
        f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
        for key, value in options.items()
    ]


def _disk(checked: Checked, run: Run, quick: bool, runs: int) -> preemption.Saving | None:
    """Compare the size of the checkpoints with the disk; returns how long a save takes, where it is known.

    Sizes and times are the run's own, where it has any, else estimated; a disk's speed is measured by a file.
    """
    size = storage.size_of_newest(run) or checked.figures.get("checkpoint_bytes")
    if size is None or checked.plan is None:
        return None
    checked.figures["checkpoint_bytes"] = size
    checked.add(storage.compare(run, size, checked.recipe.checkpoint.keep, checked.plan, runs))
    measured = timing.seconds_of_a_save(run) if run.exists() else 0.0
    if measured:
        return preemption.Saving(measured, timing.seconds_of_a_step(run), "measured in earlier attempts")
    if quick or checked.errors:
        return None
    try:
        speed = storage.write_speed(run.path, size)
    except OSError as error:
        place = storage.existing(run.path)
        checked.errors.append(f"{place}: nothing can be written there: {error}; choose another with --runs")
        return None
    return preemption.Saving(size / speed, 0.0, f"estimated: the disk takes {sized(speed)} a second")


def table(findings: Findings) -> list[str]:
    """Facts and warnings for people, a line each; errors are raised."""
    facts = [line.partition(": ")[::2] if ": " in line else ("", line) for line in findings.summary]
    facts += [("not checked", text) for text in findings.unchecked]
    width = min(WIDEST, max((len(subject) for subject, _ in facts), default=0))
    return [
        *(f"  {subject:<{width}}  {text}" for subject, text in facts),
        *(f"warning: {text}" for text in findings.warnings),
    ]


def document(findings: Findings) -> dict[str, Any]:
    """The findings for programs."""
    facts = [
        dict(zip(("subject", "text"), line.partition(": ")[::2], strict=True)) for line in findings.summary
    ]
    return {
        "errors": findings.errors,
        "warnings": findings.warnings,
        "facts": facts,
        "not_checked": findings.unchecked,
        "figures": findings.figures,
    }
