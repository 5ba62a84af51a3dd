"""The wires of the zero-copy machine, and a port in zero-copy mode on them."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from zero_copy_port import PortSlot, ZeroCopyPort

from mpassthru.testing.netns import Namespace
from mpassthru.testing.zerocopy_machine import IN_MACHINE

DRIVERS = ("virtio", "igb")
PEER_MTU = 9000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder outside the machine, saying how to get there."""
    if os.environ.get(IN_MACHINE):
        return
    for item in items:
        if "tests/zerocopy" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason="needs NICs with zero-copy: run make test-zerocopy"))


@pytest.fixture(scope="session", params=DRIVERS)
def wire(request: pytest.FixtureRequest) -> Iterator[Namespace]:
    """A NIC with zero-copy and the other end of its wire, both up. The other end takes and sends jumbo frames."""
    name = request.param
    peer = f"{name}-peer"
    for ifname in (name, peer):
        Path(f"/proc/sys/net/ipv6/conf/{ifname}/disable_ipv6").write_text("1")
    subprocess.run(["ip", "link", "set", "dev", peer, "mtu", str(PEER_MTU), "promisc", "on", "up"], check=True)
    subprocess.run(["ip", "link", "set", "dev", name, "up"], check=True)
    if name == "igb":
        subprocess.run(["ethtool", "-K", name, "rxvlan", "off"], check=True, capture_output=True)
    fd = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        yield Namespace(fd, name, socket.if_nametoindex(name), peer, socket.if_nametoindex(peer))
    finally:
        os.close(fd)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def slot(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[PortSlot]:
    """The one port that there is at a time."""
    holder = PortSlot(tmp_path_factory.mktemp("port") / "port.sock")
    yield holder
    await holder.leave()


@pytest_asyncio.fixture(loop_scope="session")
async def port(wire: Namespace, slot: PortSlot) -> ZeroCopyPort:
    """A port in zero-copy mode on the wire, with nothing promised."""
    return await slot.attach(wire)
