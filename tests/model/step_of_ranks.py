"""Run by test_gradients: one training step on each of several worlds of real processes, in float64.

python step_of_ranks.py OUT SIZE …  writes OUT/SIZE.pt: the mean loss and every parameter's gradient.
The processes are forked after the imports, before any backward, which is the only time it is allowed.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.append(str(Path(__file__).parents[1]))

from forked import run_worlds, world_over_gloo
from tiny_model import Ranks, tiny_batch, tiny_clip

from clipcluster.model.task import ContrastiveTask, Task

BATCH = 12


def step(out: Path, rank: int, size: int) -> None:
    with world_over_gloo(out, rank, size):
        task = ContrastiveTask(tiny_clip(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), Ranks(rank, size)).double()
        whole = vars(tiny_batch(BATCH))
        share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
        batch = SimpleNamespace(**{name: values[share] for name, values in whole.items()})
        wrapped = DistributedDataParallel(task) if size > 1 else task
        report = wrapped(Task.report, batch)
        report.loss.backward()
        loss = report.loss.detach().clone()
        if size > 1:
            dist.all_reduce(loss)
        if rank == 0:
            gradients = {name: parameter.grad for name, parameter in task.named_parameters()}
            torch.save({"loss": loss / size, "gradients": gradients}, out / f"{size}.pt")


if __name__ == "__main__":
    sys.exit(run_worlds(step, Path(sys.argv[1]), [int(size) for size in sys.argv[2:]]))
