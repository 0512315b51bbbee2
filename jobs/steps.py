"""What a job does that follows a finished run: an export or an evaluation, in one process."""

from __future__ import annotations

from pathlib import Path

from clipcluster.runs import files
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from clipcluster.runtime.launch import Launch
from clipcluster.runtime.outcome import Outcome
from clipcluster.runtime.stop import Stop


def perform(run: Run, attempt: Attempt, launch: Launch, stop: Stop) -> Outcome:
    """Do what `step` of the settings says with the run above this one (`jobs.submit.follow_up`).

    It is not stopped in between: killed, it leaves nothing behind and is repeated. Raises UserError.
    """
    order, training = attempt.settings()["step"], run.path.parent.parent
    out, weights = Path(order["out"]), order["weights"]
    if order["do"] == "export":
        from clipcluster.export.export import export

        export(str(training), order["format"], out, weights=weights)
    else:
        from jobs.evaluate import evaluate

        document = evaluate(str(training), order["overrides"], training.parent, weights)
        attempt.check()
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(out, document)
    print(f"{out}: made", flush=True)
    return Outcome.FINISHED
