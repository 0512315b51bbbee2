"""Time of the page about a long run, and its size.

    python tests/jobs/report/measure_report.py [--steps 1000000] [--repetitions 3]

The command `clipcluster report` as a process of its own, on a run with a logged line for each step.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.jobs.report.example_runs import long


def processor_seconds() -> float:
    """Of the processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Make the run, and the page of it several times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, out = long(Path(folder), asked.steps), Path(folder, "long.html")
        command = [sys.executable, "-m", "jobs.cli", "report", str(run.path), "--out", str(out)]
        for _ in range(asked.repetitions):
            began, used = time.perf_counter(), processor_seconds()
            subprocess.run(
                command, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()}, stdout=subprocess.DEVNULL
            )
            wall, processor = time.perf_counter() - began, processor_seconds() - used
            print(
                f"{wall:.1f} s by the clock, {processor:.1f} s of the processor, {out.stat().st_size:,} bytes"
            )


if __name__ == "__main__":
    main()
