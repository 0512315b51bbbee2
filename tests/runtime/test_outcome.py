"""Exit codes are distinct and never 1; a failure has its reason and advice."""

import os
import subprocess
import sys

from clipcluster.runtime.outcome import DataError, Failure, Outcome, RecipeFailure


def test_codes():
    values = [int(outcome) for outcome in Outcome]
    assert len(set(values)) == len(values)
    assert 1 not in values
    assert (Outcome.FINISHED, Outcome.STOPPED, Outcome.LOST_PEERS, Outcome.STALE) == (0, 85, 87, 88)
    failures = [int(kind.outcome) for kind in Failure.__subclasses__()]
    assert len(set(failures)) == len(failures)
    assert all(86 < code <= 119 for code in failures)


def test_a_failure_has_reason_and_advice():
    failure = DataError("shard 3 changed", "convert it again")
    assert (failure.reason, failure.advice, failure.agreed) == ("shard 3 changed", "convert it again", False)
    assert RecipeFailure("x", agreed=True).agreed


def test_leaving_removes_the_socket_of_the_fork_server(tmp_path):
    code = "from multiprocessing import forkserver; forkserver.ensure_running(); "
    code += "from clipcluster.runtime.outcome import leave; leave(85)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 85
    assert list(tmp_path.iterdir()) == []
