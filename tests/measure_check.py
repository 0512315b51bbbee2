"""How long `clipcluster check` takes, without torch: python tests/measure_check.py [RECIPE].

Each time in a process of its own, with nothing of SLURM on the PATH, and with the bytecode that an installed
package has. On a busy machine the fastest one counts.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMES = 20
COMMAND = "from jobs.cli.app import main; main()"


def seconds_of(recipe: str, environment: dict[str, str]) -> tuple[float, float]:
    """Wall time and processor time of one check."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    words = [sys.executable, "-c", COMMAND, "check", recipe]
    subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    from tools.convert.convert import convert

    recipe = sys.argv[1] if len(sys.argv) > 1 else "recipes/digits.yaml"
    with tempfile.TemporaryDirectory() as folder:
        if "DIGITS" not in os.environ:
            convert("digits", Path(folder) / "digits")
        left_out = ("PYTHONDONTWRITEBYTECODE", "SLURM_CONF")
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        digits = kept.get("DIGITS", f"{folder}/digits")
        environment = {**kept, "DIGITS": digits, "PATH": folder}
        seconds_of(recipe, environment)  # the first one compiles
        found = sorted(seconds_of(recipe, environment) for _ in range(TIMES))
    middle = found[len(found) // 2][0]
    print(
        f"{recipe}: {found[0][0]:.3f} s at best, {middle:.3f} s in the middle of {TIMES}; processor "
        f"{min(cpu for _, cpu in found):.3f} s"
    )


if __name__ == "__main__":
    main()
