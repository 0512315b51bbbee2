"""The ranks of a run as one value: found once, passed to whoever needs it.

Ranks find each other through an address that rank 0 publishes in the run folder. Every decision taken
together goes over gloo on the CPU, never over the device, so that it costs no synchronisation.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from clipcluster.errors import UserError
from clipcluster.runtime.place import Place
from clipcluster.runtime.stop import LostPeers, Wish

INTERFACE = "CLIPCLUSTER_INTERFACE"  # network interface of the site, as the batch script exports it
_LOOPBACK = "127.0.0.1"
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
    """

    def __init__(self, rank: int, size: int, local_rank: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def __repr__(self) -> str:
        return f"World(rank {self.rank} of {self.size}, {self.device})"

    @classmethod
    def join(
        cls,
        place: Place,
        *,
        publish: Callable[[str, int, str], None],
        find: Callable[[float], tuple[str, int, str]],
        device: torch.device,
        timeout_s: float,
    ) -> World:
        """Meet the other ranks of `place`: gloo on the CPU, and NCCL beside it where `device` is CUDA.

        Rank 0 listens on a free port of the site's interface and calls `publish(address, port, token)`; the
        others call `find(timeout_s)`, which waits for it. The token keeps attempts apart: a rank left over
        from another one meets nobody. A single process meets nobody and makes no process group.

        `timeout_s` (seconds) bounds the meeting and every collective afterwards: a peer silent for so long is
        lost. Raises LostPeers, and UserError for an interface that does not exist.
        """
        world = cls(place.rank, place.size, place.local_rank, device)
        if place.size == 1:
            return world
        interface = _interface(place)
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        on_cuda = device.type == "cuda"
        with world._telling("did not meet the others"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
                store=_meet(place, interface, publish, find, timeout_s),
                rank=place.rank,
                world_size=place.size,
                timeout=timedelta(seconds=timeout_s),
                device_id=device if on_cuda else None,
            )
        return world

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Turn what a collective says of a dead or silent peer into LostPeers."""
        try:
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
            return wishes
        mask = torch.tensor([int(wishes)], dtype=torch.int64)
        with self._telling("lost its peers"):
            dist.all_reduce(mask, op=dist.ReduceOp.BOR)
        return Wish(int(mask.item()))

    def barrier(self) -> None:
        """Wait until every rank is here. Raises LostPeers."""
        self.agree(Wish.NONE)

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """The picklable `value` of rank `src`, on every rank, over the CPU. Raises LostPeers."""
        if self.size == 1:
            return value
        box = [value]
        with self._telling("lost its peers"):
            dist.broadcast_object_list(box, src=src, device=torch.device("cpu"))
        return box[0]

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


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` is how gloo, NCCL or the store tell of a dead or silent peer.

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
    place: Place,
    interface: str | None,
    publish: Callable[[str, int, str], None],
    find: Callable[[float], tuple[str, int, str]],
    timeout_s: float,
) -> dist.Store:
    """The store of this attempt, held by rank 0."""
    timeout = timedelta(seconds=timeout_s)
    if place.rank == 0:
        address = _address(interface)
        # Bound here and handed over: left to itself the store would listen on every address of the machine.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((address, 0))
        listener.listen(4096)
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


def _interface(place: Place) -> str | None:
    """The network interface to use: the site's, else loopback on a single machine, else gloo's own choice."""
    named = os.environ.get(INTERFACE)
    if named:
        known = [name for _, name in socket.if_nameindex()]
        if named not in known:
            raise UserError(
                f"cluster.interface: {socket.gethostname()} has no network interface {named!r}; "
                f"it has {', '.join(known)}. Name one of them, or leave the key out."
            )
        return named
    return _loopback_name() if place.nodes == 1 or _nodes_are_one_machine() else None


def _nodes_are_one_machine() -> bool:
    """Whether SLURM's nodes all live here, as in a sandbox: srun was started at a loopback address."""
    try:
        return ipaddress.ip_address(os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "")).is_loopback
    except ValueError:
        return False


def _loopback_name() -> str | None:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)


def _address(interface: str | None) -> str:
    """The IPv4 address that rank 0 listens on."""
    if interface is None:
        return _host_address()
    if interface in ("lo", "lo0"):
        return _LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR, netdevice(7)
        except OSError as error:
            raise UserError(
                f"cluster.interface: {interface!r} on {socket.gethostname()} has no IPv4 address ({error}). "
                "Name an interface that the nodes reach each other by."
            ) from error
    return socket.inet_ntoa(answer[20:24])


def _host_address() -> str:
    """The address that other machines reach this one by: the host name's, unless that is loopback."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = _LOOPBACK
    if not ipaddress.ip_address(address).is_loopback:
        return address
    # Debian gives the host name 127.0.1.1: ask which address leads outside. Connecting UDP sends nothing.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            return address
        return str(probe.getsockname()[0])
