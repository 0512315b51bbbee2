"""The whole check of a recipe: what `clipcluster check` shows, and every submission first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clipcluster.check.plain import Checked, Findings
from clipcluster.recipe.load import result_keys
from clipcluster.runs import timing
from clipcluster.runs.folder import Run
from clipcluster.runs.sweeps import run_of as _run_of
from clipcluster.text import sized
from jobs.check import memory, preemption, storage
from jobs.submit import executor

WIDEST = 14  # subjects of facts are aligned up to so many characters
DEEP = "towers, weights, samples, parameters, memory, checkpoint size"


def run_of(checked: Checked, runs: Path) -> Run:
    """The run that a submission of the recipe would start or resume."""
    loaded = checked.loaded
    return _run_of(loaded.recipe.name, loaded.title, result_keys(loaded), runs)


def complete(
    checked: Checked,
    run: Run,
    chosen: str,
    *,
    assets: Path | None = None,
    quick: bool,
    others: Sequence[Run] = (),
    refused_ends: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Add to the plain check what the deep one finds (unless `quick`), and the cluster and the disk.

    chosen: where the run goes: slurm, local or none. assets: folder of what was fetched for the run. others:
    runs with as large checkpoints that start together with it. refused_ends: a job that the cluster refuses
    is not checked deeply, as in a submission. say: is told that the deep check begins.
    """
    of_cluster = checked.without_findings()  # asked before the deep check, which takes longer, shown after it
    cluster = checked.recipe.cluster
    of_cluster.summary.append(executor.devices(cluster, chosen))
    placed = None
    if chosen == "slurm":
        from jobs.submit import placement  # it loads what only a cluster needs

        placed = placement.compare(of_cluster, run)
    elif chosen == "local" and (missing := executor.missing_devices(cluster)):
        of_cluster.warnings.append(missing)
    if checked.awaited and not quick:
        checked.unchecked.append(f"{DEEP}: what the run starts from is not made yet")
    elif quick:
        checked.unchecked.append(f"{DEEP} (clipcluster check --deep checks them)")
    elif not (checked.errors or (refused_ends and of_cluster.errors)):
        say("checking towers, weights, samples and memory; submit --quick skips this")
        from clipcluster.check import deep

        checked.unchecked.clear()  # it looks at all of that
        checked.add(deep.check(checked.recipe, world_size=checked.world_size, assets=assets))
    else:
        checked.unchecked.append(f"{DEEP}: skipped; fix the errors first")
    checked.add(of_cluster)
    if taken := checked.figures.get("memory_bytes"):
        device = memory.device_of(checked.recipe, placed.nodes if placed else ())
        checked.figures |= {"device_bytes": device.bytes} if device else {}
        checked.add(memory.compare(checked.recipe, checked.world_size, taken, device))
    saving = _disk(checked, [run, *others], quick)
    if placed:
        checked.add(preemption.compare(placed.partition, placed.known, placed.grace, saving))


def _disk(checked: Checked, runs: Sequence[Run], quick: bool) -> preemption.Saving | None:
    """Compare the size of the checkpoints with the disk; returns how long a save takes, where it is known.

    Sizes and times are the first run's own, where it has any, else estimated; a disk's speed is measured by a
    file.
    """
    run = runs[0]
    size = storage.size_of_newest(run) or checked.figures.get("checkpoint_bytes")
    if size is None or checked.plan is None:
        return None
    checked.figures["checkpoint_bytes"] = size
    checked.add(storage.compare(runs, size, checked.recipe.checkpoint.keep, checked.plan))
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
