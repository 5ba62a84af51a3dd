"""What a Linux guest asks its network device for, and its link, by QEMU's monitor: the port follows (`--qmp`)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mpassthru.demo.qemu import find_kernel
from mpassthru.netdev import read_address
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.netns import Namespace, veth_namespace
from mpassthru.testing.qemu import QemuGuest
from mpassthru.testing.qemu_config import GuestConfig, GuestNic, VhostUserBackend
from mpassthru.testing.scenario_qemu import configure_interface, ping

GUEST_MAC = "52:54:00:12:34:56"
NEW_MAC = "52:54:00:12:34:57"
MACVLAN_MAC = "52:54:00:00:00:11"
STRANGER_MAC = "52:54:00:00:00:99"
IPV6_ADDRESS = "fd00::aa:bbcc/64"
GROUP = "33:33:ff:aa:bb:cc"
"""Of its neighbour discovery (RFC 4291 section 2.7.1, RFC 2464 section 7)."""
BROADCAST = "ff:ff:ff:ff:ff:ff"
PEER_ADDRESS, GUEST_ADDRESS = "10.77.0.1", "10.77.0.2"


@dataclass
class Followed:
    """A guest whose port follows it, and the far end of its wire."""

    guest: QemuGuest
    port: AttachedPort
    namespace: Namespace
    wire: socket.socket
    host_mac: str

    async def delivers(self, destination: str, *, vlan: int | None = None) -> bool:
        """Send a frame; whether it was for the guest. Nothing else arrives on this wire, as long as nobody pings."""
        before = self._counts()
        tag = b"" if vlan is None else b"\x81\x00" + vlan.to_bytes(2)
        source = bytes.fromhex("0200000000ff")
        self.wire.send((bytes.fromhex(destination.replace(":", "")) + source + tag + b"\x88\xb5").ljust(60, b"\0"))
        await self.port.until(lambda _: sum(self._counts().values()) == sum(before.values()) + 1)
        after = self._counts()
        assert after["dropped_no_guest"] == before["dropped_no_guest"], "the guest is there"
        return after["redirected"] > before["redirected"]

    def _counts(self) -> dict[str, int]:
        assert self.port.report is not None
        return self.port.report.steering["0"]

    async def does(self, command: str, destination: str, *, vlan: int | None = None, delivered: bool = True) -> None:
        """Have the guest do something, and wait until the port follows."""
        assert await self.delivers(destination, vlan=vlan) != delivered, f"before: {command}"
        await self.guest.run(command)
        async with asyncio.timeout(20):
            while await self.delivers(destination, vlan=vlan) != delivered:
                pass

    async def packets(self, interface: str) -> int:
        """What an interface of the guest has received."""
        return int((await self.guest.run(f"cat /sys/class/net/{interface}/statistics/rx_packets")).output)


@asynccontextmanager
async def followed_guest(folder: Path) -> AsyncIterator[Followed]:
    path, monitor = folder / "port.sock", folder / "qmp.sock"
    config = GuestConfig(
        kernel=find_kernel(),
        nics=(GuestNic(backend=VhostUserBackend(socket_path=path), mac=GUEST_MAC),),
        modules=("macvlan", "8021q"),
        # Another device, of which nobody is to hear.
        extra_arguments=(
            *("-device", "virtio-net-pci,id=other,romfile="),
            *("-qmp", f"unix:{monitor},server=on,wait=off"),
        ),
    )
    with veth_namespace() as namespace:
        namespace.run("ip", "address", "add", f"{PEER_ADDRESS}/24", "dev", namespace.peer)
        async with attached_port(namespace, path, "--steer", "mac", "--qmp", str(monitor)) as port:
            await port.until_said("is ready")
            async with QemuGuest(config) as guest:
                await port.until_said("tells what the guest asks virtio-net-pci.0 for")
                await configure_interface(guest, f"{GUEST_ADDRESS}/24")
                report = await port.until(
                    lambda report: report.guest == "running" and "1 address" in str(report.filter)
                )
                assert report.filter is not None
                with namespace.entered():
                    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
                    wire.bind((namespace.peer, 0))
                    host_mac = read_address(namespace.ifindex).hex(":")
                with wire:
                    yield Followed(guest, port, namespace, wire, host_mac)
            report = await port.stop()
    assert not report.troubles


@pytest.mark.slow
async def test_port_follows_what_the_guest_asks_for(tmp_path: Path) -> None:
    async with followed_guest(tmp_path) as f:
        assert await f.delivers(GUEST_MAC)
        assert await f.delivers(BROADCAST)
        assert not await f.delivers(f.host_mac)

        add = f"ip link add link eth0 name m0 address {MACVLAN_MAC} type macvlan && ip link set m0 up"
        await f.does(add, MACVLAN_MAC)
        received = await f.packets("m0")
        assert await f.delivers(MACVLAN_MAC)
        assert await f.packets("m0") > received
        await f.does(f"ip address add {IPV6_ADDRESS} dev eth0", GROUP)
        await f.does("ip link add link eth0 name v5 type vlan id 5 && ip link set v5 up", GUEST_MAC, vlan=5)
        received = await f.packets("v5")
        assert await f.delivers(GUEST_MAC, vlan=5)
        assert await f.packets("v5") > received
        assert not await f.delivers(GUEST_MAC, vlan=6)

        await f.does("ip link set eth0 promisc on", STRANGER_MAC)
        assert await f.delivers(GUEST_MAC, vlan=6)
        assert not await f.delivers(f.host_mac), "the host's own address is never the guest's for the asking"
        await f.does("ip link set eth0 promisc off", STRANGER_MAC, delivered=False)

        await f.does(f"ip link set eth0 address {NEW_MAC}", NEW_MAC)
        assert not await f.delivers(GUEST_MAC)
        await f.does("ip link del m0", MACVLAN_MAC, delivered=False)
        await f.does("ip link del v5", NEW_MAC, vlan=5, delivered=False)
        await f.does(f"ip address del {IPV6_ADDRESS} dev eth0", GROUP, delivered=False)
        answers = await ping(f.guest, PEER_ADDRESS)
        assert answers.received == answers.sent


@pytest.mark.slow
async def test_guest_sees_the_carrier_of_the_hosts_interface_go_and_come(tmp_path: Path) -> None:
    carrier = "cat /sys/class/net/eth0/carrier"
    async with followed_guest(tmp_path) as f:
        for _ in range(2):
            f.namespace.run("ip", "link", "set", "dev", f.namespace.peer, "down")
            await f.guest.run(f"until [ $({carrier}) = 0 ]; do usleep 10000; done")
            f.namespace.run("ip", "link", "set", "dev", f.namespace.peer, "up")
            await f.guest.run(f"until [ $({carrier}) = 1 ]; do usleep 10000; done")
            await f.port.until(lambda report: report.guest == "running" and report.link)
        answers = await ping(f.guest, PEER_ADDRESS)
        assert answers.received == answers.sent
