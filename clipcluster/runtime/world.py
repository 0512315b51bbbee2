"""The ranks of a run as one value: found once, passed to whoever needs it.

Ranks find each other through an address that rank 0 publishes in the run folder. Every decision taken
together goes over gloo on the CPU, never over the device, so that it costs no synchronisation.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from clipcluster.runtime.devices import backends
from clipcluster.runtime.launch import Launch
from clipcluster.runtime.network import address_of, interface_of, listen, site_interface
from clipcluster.runtime.outcome import Failure, LostPeers, described, restored
from clipcluster.runtime.pulse import Pulse
from clipcluster.runtime.stop import Stop, Wish

_BEAT_S = 1.0  # between two signs of life of rank 0 while it works alone
# What gloo, NCCL and the store say of a peer that is gone or silent, in lower case.
_LOST = (
    "/gloo/transport/",  # gloo names the source file that noticed
    "gloo connectfullmesh failed",
    "connection closed by peer",
    "connection closed by remote peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "wait timeout",
    "socket timeout",
    "ncclremoteerror",
    "nccl communicator was aborted",
    "remote process exited",
    "watchdog caught collective operation timeout",
)


class World:
    """This process among `size` ranks; `device` is where its towers live.

    Made by `World.join`, or as `World(0, 1, 0, device)` for a single process.
    `pulse`: its signs of life; every collective that ends is one.
    """

    def __init__(self, rank: int, size: int, local_rank: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.device = device
        self.pulse = Pulse(queues=device.type != "cpu")

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def __repr__(self) -> str:
        return f"World(rank {self.rank} of {self.size}, {self.device})"

    @classmethod
    def join(
        cls,
        launch: Launch,
        *,
        publish: Callable[[str, int, str], None],
        find: Callable[[float], tuple[str, int, str]],
        device: torch.device,
        timeout_s: float,
    ) -> World:
        """Meet the other ranks of `launch`: gloo on the CPU, and the device's own backend (NCCL) beside it.

        Rank 0 listens on a free port of the site's interface and calls `publish(address, port, token)`; the
        others call `find(timeout_s)`, which waits for it. The token keeps attempts apart: a rank left over
        from another one finds no peers. A single process makes no process group.

        `timeout_s` (seconds) bounds the meeting and every collective afterwards: a peer silent for so long is
        lost. Raises LostPeers, and UserError for an interface that does not exist.
        """
        world = cls(launch.rank, launch.size, launch.local_rank, device)
        if launch.size == 1:
            return world
        interface = site_interface(launch)
        if interface:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        # By itself gloo takes the address of the host name, which may be loopback (127.0.1.1 on Debian).
        beside_store = interface or interface_of(address_of(None))
        if beside_store:
            os.environ["GLOO_SOCKET_IFNAME"] = beside_store
        with world._telling("could not reach the other ranks"):
            dist.init_process_group(
                backends(device),
                store=_meet(launch, interface, publish, find, timeout_s),
                rank=launch.rank,
                world_size=launch.size,
                timeout=timedelta(seconds=timeout_s),
                device_id=None if device.type == "cpu" else device,
            )
        return world

    @contextmanager
    def _telling(self, what: str, *, waits: bool = True, counts: bool = True) -> Iterator[None]:
        """Raise a collective's error about a dead or silent peer as LostPeers.

        waits, counts: see `Pulse.with_others`.
        """
        try:
            with self.pulse.with_others(waits=waits, counts=counts):
                yield
        except (RuntimeError, TimeoutError) as error:
            if isinstance(error, TimeoutError) or is_lost_peer(error):
                raise LostPeers(f"rank {self.rank} of {self.size} {what}: {error}") from error
            raise

    def agree(self, wishes: Wish) -> Wish:
        """The bitwise OR of all ranks' wishes, called by all at the same point. Never waits for the device.

        Raises LostPeers where a rank is gone, or silent for longer than the timeout.
        """
        if self.size == 1:
            self.pulse.beat()
            return wishes
        mask = torch.tensor([int(wishes)], dtype=torch.int64)
        with self._telling("lost its peers"):
            dist.all_reduce(mask, op=dist.ReduceOp.BOR)
        return Wish(int(mask.item()))

    def reason_to_stop(self, stop: Stop) -> str:
        """Who was asked to stop and how, of the lowest rank that was, on every rank. Raises LostPeers.

        Called by all ranks at the same point, after they agreed to stop.
        """
        own = f"rank {self.rank} got {stop.reason}" if stop.requested else None
        return next((reason for reason in self.gather(own) if reason), "asked to stop")

    def barrier(self) -> None:
        """Wait until every rank is here. Raises LostPeers."""
        self.agree(Wish.NONE)

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """The `value` of rank `src`, on every rank, over the CPU.

        It travels as JSON, never as a pickle: None, booleans, numbers, strings, lists and mappings. A tuple
        arrives as a list and a key as a string, on rank `src` and in a single process too.
        Raises TypeError for anything else, and LostPeers.
        """
        sent = _to_bytes(value) if self.rank == src else torch.empty(0, dtype=torch.uint8)
        if self.size > 1:
            length = torch.tensor([len(sent)])
            with self._telling("lost its peers"):
                dist.broadcast(length, src=src)
                sent = sent if self.rank == src else torch.empty(int(length), dtype=torch.uint8)
                dist.broadcast(sent, src=src)
        return _from_bytes(sent)

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in order of rank, on every rank. Types and errors as in `broadcast`."""
        sent = _to_bytes(value)
        if self.size == 1:
            return [_from_bytes(sent)]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._telling("lost its peers"):
            dist.all_gather(lengths, torch.tensor([len(sent)]))
            longest = max(int(length) for length in lengths)
            received = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(received, torch.cat((sent, torch.zeros(longest - len(sent), dtype=torch.uint8))))
        return [_from_bytes(one[: int(length)]) for one, length in zip(received, lengths, strict=True)]

    def raise_first(self, error: Exception | None) -> None:
        """Raise, on every rank, the error of the lowest rank that has one; return where none has.

        Called by all ranks at the same point. Errors travel as name, reason and advice (`described`); a
        Failure is `agreed` from here on. Raises LostPeers.
        """
        found = self.gather(described(error) if error else None)
        first = next((rank for rank, description in enumerate(found) if description), None)
        if first is None:
            return
        raised = error if first == self.rank and error else restored(found[first])
        if isinstance(raised, Failure):
            raised.agreed = True
        raise raised

    def while_main(self, action: Callable[[], Any]) -> Any:
        """Let rank 0 run `action`, however long it takes, and return its value on every rank.

        Called by all ranks at the same point. Rank 0 runs it in a thread and takes part in a short collective
        every second meanwhile, so that the others can tell a slow action from a lost rank. Signs of life
        are those of rank 0: where its action gets no further, no rank does. The value is sent as by
        `broadcast`; what `action` raises is raised on all ranks, as by `raise_first`. Raises LostPeers.
        """
        if self.size == 1:
            return self.broadcast(action())
        with ThreadPoolExecutor(1) as pool:  # left once the action has ended, where a peer is lost too
            work = pool.submit(action) if self.is_main else None
            before = -1
            while (beats := self._beat(work)) is not None:
                if beats != before and not self.is_main:
                    self.pulse.beat()
                before = beats
        error = work.exception() if work else None
        self.raise_first(error if isinstance(error, Exception | None) else RuntimeError(repr(error)))
        return self.broadcast(work.result() if work else None)

    def _beat(self, work: Future[Any] | None) -> int | None:
        """One short collective: rank 0's signs of life so far, None once it is no longer at work."""
        unfinished = wait([work], timeout=_BEAT_S).not_done if work else ()
        main = torch.tensor([len(unfinished), self.pulse.beats if work else 0])
        with self._telling("lost its peers", waits=work is None, counts=False):
            dist.all_reduce(main)
        return int(main[1]) if main[0] else None

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` (any shape, on the CPU or the world's device) over the ranks, in place; returns it.

        Raises LostPeers.
        """
        if self.size == 1:
            return tensor
        with self._telling("lost its peers"):
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def leave(self) -> None:
        """Close the process group; called once all ranks have agreed to end. Harmless in a single process."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _to_bytes(value: Any) -> torch.Tensor:
    """`value` as JSON, (bytes,) uint8."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(content: torch.Tensor) -> Any:
    return json.loads(content.numpy().tobytes())


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` is what gloo, NCCL or the store raise for a dead or silent peer.

    Such errors surface wherever a collective runs: in a backward pass under DDP too.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (LostPeers, dist.DistNetworkError, dist.DistStoreError)):
            return True
        if isinstance(seen, RuntimeError) and any(sign in str(seen).lower() for sign in _LOST):
            return True
        seen = seen.__cause__
    return False


def _meet(
    launch: Launch,
    interface: str | None,
    publish: Callable[[str, int, str], None],
    find: Callable[[float], tuple[str, int, str]],
    timeout_s: float,
) -> dist.Store:
    """The store of this attempt, held by rank 0."""
    timeout = timedelta(seconds=timeout_s)
    if launch.rank == 0:
        address = address_of(interface)
        # Handed over: left to itself the store would listen on every address of the machine.
        listener = listen(address)
        port, token = listener.getsockname()[1], secrets.token_hex(8)
        store = dist.TCPStore(
            address,
            port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        publish(address, port, token)
    else:
        address, port, token = find(timeout_s)
        store = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(token, store)
