"""What every rank of a site check does: look at its node and the shared folder, reduce with the others."""

from __future__ import annotations

import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcluster.errors import UserError
from clipcluster.runs import files
from clipcluster.runtime import network
from clipcluster.runtime.environment import share_cores
from clipcluster.runtime.launch import Launch
from jobs.sites import node
from jobs.sites.reports import Report, read

if TYPE_CHECKING:
    import torch

    from clipcluster.runtime.world import World

MEETING = "rendezvous.json"
PATIENCE_S = 60.0  # for the other ranks, and for a file of theirs to be seen
ROUNDS = 5
_BYTES = {"cpu": 16 << 20}  # that are reduced
_BYTES_ELSEWHERE = 256 << 20
_NCCL_LOG = "nccl-{}.log"


@dataclass(frozen=True)
class SiteCheck:
    """A rank of the check. Pickled by reference; `gpus` are those of a node that the profile asks for."""

    folder: Path
    gpus: int

    def __call__(self) -> None:
        """Report, whatever fails."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
        launch = Launch.from_environment()
        report = Report(self.folder, launch.rank)
        report.add(
            **node.facts(self.folder), size=launch.size, nodes=launch.nodes, local_rank=launch.local_rank
        )
        try:
            self.check(launch, report)
            report.add(done=True)
        except Exception as error:
            traceback.print_exc()
            report.add(error=f"{type(error).__name__}: {error}")
            os._exit(1)  # the others may wait in a collective

    def check(self, launch: Launch, report: Report) -> None:
        """All that may fail. What was found until then is reported."""
        report.add(first_folder=first_to_make(self.folder / "first"))
        report.add(first_file=files.link_once(self.folder / "first.json", launch.rank))
        share_cores()
        began = time.monotonic()
        import torch

        from clipcluster.runtime.world import World

        report.add(torch=torch.__version__, torch_seconds=time.monotonic() - began)
        device, said, lacks = device_of(launch, self.gpus)
        report.add(device=said, device_lacks=lacks)
        try:
            network.address_of(network.site_interface(launch))
        except UserError as error:
            report.add(interface_error=str(error))
            return
        world = World.join(
            launch,
            publish=lambda address, port, token: files.write_json(
                self.folder / MEETING, {"address": address, "port": port, "token": token}, private=True
            ),
            find=lambda seconds: found_in(self.folder / MEETING, seconds),
            device=torch.device("cpu"),
            timeout_s=PATIENCE_S,
        )
        meeting = world.broadcast(read(self.folder / MEETING)) if launch.size > 1 else None
        report.add(address=meeting["address"] if meeting else None)
        report.add(clock_offsets=clock_offsets(world))
        report.add(seen_after=seen_after(world, self.folder))
        report.add(gloo=reduce_all(world, torch.device("cpu")))
        if self.gpus and not any(world.gather(lacks)):
            report.add(nccl=self.on_devices(world, device))
        world.leave()

    def on_devices(self, world: World, device: torch.device) -> dict[str, Any]:
        """The all-reduce between devices, and the network that NCCL says it uses."""
        log = self.folder / _NCCL_LOG.format(world.rank)
        os.environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_FILE=str(log))
        measured = reduce_all(world, device)
        return {**measured, "network": nccl_network(log.read_text(errors="replace") if log.exists() else "")}


def first_to_make(folder: Path) -> bool:
    """Whether this process made the folder; of all processes of all nodes one must have."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def found_in(file: Path, seconds: float) -> tuple[str, int, str]:
    """Where rank 0 listens. Raises TimeoutError."""
    found = awaited(lambda: read(file), seconds)
    if found is None:
        raise TimeoutError(f"{file} was not seen within {seconds:g} s")
    return found["address"], found["port"], found["token"]


def awaited(look: Callable[[], Any], seconds: float) -> Any:
    """What `look` gives once it gives anything; None after `seconds`."""
    deadline = time.monotonic() + seconds
    while (found := look()) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def device_of(launch: Launch, gpus: int) -> tuple[torch.device, str, bool]:
    """This rank's device and its name; the CPU, why, and True where one that was asked for is not there."""
    import torch

    from clipcluster.runtime.devices import describe, pick_device

    try:
        device = pick_device(launch.local_rank, per_node=gpus, required=True)
        return device, describe(device), False
    except (UserError, RuntimeError) as error:
        return torch.device("cpu"), str(error), True


def clock_offsets(world: World) -> list[float]:
    """How far each rank's clock is ahead of rank 0's, in seconds, read right after a barrier; the median."""
    rounds = []
    for _ in range(ROUNDS):
        world.barrier()
        times = world.gather(time.time())
        rounds.append([each - times[0] for each in times])
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def seen_after(world: World, folder: Path) -> list[float | None]:
    """After how many seconds each rank reads what rank 0 has written durably; None: not at all."""
    file = folder / "seen.json"
    read(file)  # a file that is not there may be remembered as such
    world.barrier()
    if world.is_main:
        files.write_json(file, {"written": True})
    world.barrier()
    began = time.monotonic()
    found = awaited(lambda: read(file), PATIENCE_S / 2)
    return list(world.gather(None if found is None else time.monotonic() - began))


def reduce_all(world: World, device: torch.device) -> dict[str, Any]:
    """Sum a tensor over the ranks: whether the sum is right, and the median seconds of further ones.

    `bus` is the bandwidth that the slowest link must have carried, bytes a second: 2 (n - 1) / n of the
    tensor in the measured time (nccl-tests, "Performance", AllReduce).
    """
    import torch
    import torch.distributed as dist

    size = _BYTES.get(device.type, _BYTES_ELSEWHERE)
    group: Any = None  # the gloo of all ranks
    if device.type != "cpu" and world.size > 1:
        from datetime import timedelta

        backend = dist.get_default_backend_for_device(device)
        group = dist.new_group(backend=backend, timeout=timedelta(seconds=PATIENCE_S))
    tensor = torch.full((size // 4,), world.rank + 1.0, device=device)
    right, seconds = True, []
    for number in range(ROUNDS + 1):
        world.barrier()
        began = time.perf_counter()
        if world.size > 1:
            dist.all_reduce(tensor, group=group)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
        if number == 0:
            right = bool((tensor == world.size * (world.size + 1) / 2).all())
            tensor.zero_()
    median = statistics.median(seconds[1:])
    bus = 2 * (world.size - 1) / world.size * size / median
    return {"right": right, "bytes": size, "seconds": median, "bus": bus}


def nccl_network(log: str) -> str:
    """The network that NCCL's log names ("Using network IB"): IB, Socket, a plugin's name; "" for none."""
    mark = "Using network "
    line = next((line for line in log.splitlines() if mark in line), "")
    return line.partition(mark)[2].strip()
