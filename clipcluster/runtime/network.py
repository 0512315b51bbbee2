"""Where a rank listens: on the site's interface or on loopback, never on every address of the machine."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct

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
        known = [name for _, name in socket.if_nameindex()]
        if named not in known:
            raise UserError(
                f"cluster.interface: {socket.gethostname()} has no network interface {named!r}; "
                f"it has {', '.join(known)}. Name one of them, or leave the key out."
            )
        return named
    return _loopback_name() if launch.nodes == 1 or _nodes_are_one_machine() else None


def _nodes_are_one_machine() -> bool:
    """Whether all SLURM nodes are this machine, as in a sandbox: srun was started at a loopback address."""
    try:
        return ipaddress.ip_address(os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "")).is_loopback
    except ValueError:
        return False


def _loopback_name() -> str | None:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)


def address_of(interface: str | None) -> str:
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


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address, or None where none has."""
    for _, name in socket.if_nameindex():
        with contextlib.suppress(UserError):  # an interface without an IPv4 address
            if address_of(name) == address:
                return name
    return None


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
