"""Where a rank listens: on the site's interface or on loopback, never on every address of the machine."""

from __future__ import annotations

import ipaddress
import os
import socket

import psutil

from clipcluster.errors import UserError
from clipcluster.runtime.environment import INTERFACE
from clipcluster.runtime.launch import Launch

_LOOPBACK = "127.0.0.1"


def listen(address: str, port: int = 0) -> socket.socket:
    """A socket that listens on `address` (a name, IPv4 or IPv6) alone, at `port` or any free one.

    Raises OSError where this machine has no such address, or the port is taken.
    """
    family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(4096)
    except BaseException:
        listener.close()
        raise
    return listener


def site_interface(launch: Launch) -> str | None:
    """The network interface to use: the site's, else loopback on a single machine, else gloo's own choice."""
    named = os.environ.get(INTERFACE)
    if named:
        known = psutil.net_if_addrs()
        if named not in known:
            raise UserError(
                f"cluster.interface: {socket.gethostname()} has no network interface {named!r}; "
                f"it has {', '.join(known)}. Name one of them, or leave the key out."
            )
        return named
    return interface_of(_LOOPBACK) if launch.nodes == 1 or _nodes_are_one_machine() else None


def _nodes_are_one_machine() -> bool:
    """Whether all SLURM nodes are this machine, as in a sandbox: srun was started at a loopback address."""
    try:
        return ipaddress.ip_address(os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "")).is_loopback
    except ValueError:
        return False


def address_of(interface: str | None) -> str:
    """The IPv4 address that rank 0 listens on."""
    if interface is None:
        return _host_address()
    address = _addresses().get(interface)
    if address is None:
        raise UserError(
            f"cluster.interface: {interface!r} on {socket.gethostname()} has no IPv4 address. "
            "Name an interface that the nodes reach each other by."
        )
    return address


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address, or None where none has."""
    return next((name for name, own in _addresses().items() if own == address), None)


def _addresses() -> dict[str, str]:
    """The first IPv4 address of each network interface that has one."""
    return {
        name: own.address
        for name, addresses in psutil.net_if_addrs().items()
        for own in reversed(addresses)
        if own.family == socket.AF_INET
    }


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
