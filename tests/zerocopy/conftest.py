"""The wires of the zero-copy machine, and a port in zero-copy mode on each."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from zero_copy_port import ZeroCopyPort

from mpassthru.testing.attached_port import attached_port
from mpassthru.testing.netns import Namespace
from mpassthru.testing.wire import PacketWire
from mpassthru.testing.zerocopy_machine import IN_MACHINE

DRIVERS = ("virtio", "igb")
PEER_MTU = 9000
READY_TIMEOUT_S = 90


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder outside the machine, saying how to get there."""
    if os.environ.get(IN_MACHINE):
        return
    for item in items:
        if "tests/zerocopy" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason="needs NICs with zero-copy: run make test-zerocopy"))


@pytest.fixture(scope="module", params=DRIVERS)
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


@asynccontextmanager
async def zero_copy_port(wire: Namespace, folder: Path, *options: str) -> AsyncIterator[ZeroCopyPort]:
    """Attach to the wire for the length of a block."""
    path = folder / "port.sock"
    async with attached_port(wire, path, "--mode", "zero-copy", *options) as port:
        await port.until_said("ready", timeout_s=READY_TIMEOUT_S)
        async with PacketWire(wire.peer_ifindex) as peer:
            yield ZeroCopyPort(wire.ifname, path, port, peer)
        await port.stop(timeout_s=60)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(wire: Namespace, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ZeroCopyPort]:
    """A port that the guests of a module connect to, one after the other: it takes seconds to start in the machine."""
    async with zero_copy_port(wire, tmp_path_factory.mktemp("port")) as attached:
        yield attached
