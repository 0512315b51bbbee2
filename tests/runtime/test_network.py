"""Addresses and interfaces of this machine, and listening on one of them alone."""

import socket

import pytest

from clipcluster.errors import UserError
from clipcluster.runtime.launch import Launch
from clipcluster.runtime.network import address_of, interface_of, listen, site_interface


@pytest.mark.parametrize("address", ["127.0.0.2", "localhost"])
def test_listening_on_one_address_alone(address):
    with listen(address) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection((address, port), timeout=5):
            pass
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.3", port), timeout=5)


def test_an_address_of_another_machine():
    with pytest.raises(OSError, match="assign"):
        listen("198.51.100.1")


def test_an_interface_that_is_not_there(monkeypatch):
    monkeypatch.setenv("CLIPCLUSTER_INTERFACE", "ib9")
    with pytest.raises(UserError, match=r"no network interface 'ib9'; it has .*lo"):
        site_interface(Launch(0, 2, 0, 1, 0, 2, "1", "slurm"))


def test_addresses():
    assert address_of("lo") == "127.0.0.1"
    assert len(address_of(None).split(".")) == 4
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("198.51.100.1") is None
