"""Run by test_gradients: one training step on each of several worlds of real processes, in float64.

python step_of_ranks.py OUT SIZE …  writes OUT/SIZE.pt: the mean loss and every parameter's gradient.
The processes are forked after the imports, before any backward, which is the only time it is allowed.
"""

import datetime
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.append(str(Path(__file__).parents[1]))

from forked import exit_codes
from tiny_model import Ranks, tiny_batch, tiny_clip

from clipcluster.model.task import ContrastiveTask, Task

BATCH = 12


def step(out: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{out}/store-{size}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=60),
        )
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
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> int:
    out, sizes = Path(sys.argv[1]), [int(size) for size in sys.argv[2:]]
    for size in sizes:
        if any(exit_codes(step, [(out, rank, size) for rank in range(size)])):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
