"""What a submission was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobs.train import EVALUATOR, TRAINEE


@dataclass(frozen=True)
class Awaited:
    """What must end well before a run starts: the folder that it makes, its jobs on SLURM, its runs."""

    path: Path
    jobs: tuple[str, ...] = ()
    runs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What the command line asked for."""

    recipe: Path
    overrides: Sequence[str] = ()
    runs: Path = Path("runs")
    site: str | None = None
    executor: str | None = None  # slurm | local | none (the folder alone); None: slurm where there is one
    follow: bool = False
    dry_run: bool = False
    quick: bool = False
    after: Sequence[Awaited] = ()  # what has not ended yet
    chain: tuple[tuple[Path, tuple[str, ...]], ...] = ()  # recipes, with overrides, that wait for it
    trainee: str = TRAINEE  # what a rank of the training runs
    evaluator: str = EVALUATOR  # … and one of an evaluation's own job
    say: Callable[[str], None] = field(default=print)

    @property
    def dependency(self) -> str:
        """What its jobs on SLURM wait for, as sbatch takes it: jobs that end well. Empty where for none."""
        jobs = [job for one in self.after for job in one.jobs]
        return f"afterok:{':'.join(jobs)}" if jobs else ""

    @property
    def after_runs(self) -> list[str]:
        """The folders of the runs that must finish before."""
        return [str(run) for one in self.after for run in one.runs]
