"""What one task of an allocation runs. Pickled by reference, and restarted as it is at every attempt."""

from __future__ import annotations

import os
import traceback

from clipcluster.runtime.outcome import Outcome, leave
from clipcluster.runtime.stop import Stop

TRAINEE = "clipcluster.run:train"
EVALUATOR = "clipcluster.run:evaluate_owed"  # what a job of an evaluation runs in place of it


class TrainJob:
    """One rank of a run: a folder and a dotted name, so that the pickle outlives a change of code.

    Args:
        run_dir: the run's folder, absolute.
        trainee: "package.module:function" that trains; tests of endings name one without torch.
    """

    def __init__(self, run_dir: str, trainee: str = TRAINEE) -> None:
        self.run_dir = run_dir
        self.trainee = trainee

    def __call__(self) -> None:
        """Serve the rank and leave the process with its code; submitit never sees a return."""
        stop = Stop()
        stop.install(interactive="SLURM_JOB_ID" not in os.environ)
        code: int = Outcome.ERROR
        try:
            from clipcluster.rank.serve import serve  # after the handlers: a signal during imports would kill

            code = serve(self.run_dir, self.trainee, stop)
        except BaseException:
            traceback.print_exc()
        finally:
            leave(code)
