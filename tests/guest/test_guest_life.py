"""What a guest does to its NIC while frames fly: it reboots, binds the driver anew, tries to resize a ring.

The first two are a stop and a new start of virtqueues. After each the same port carries traffic and has nothing to
complain of.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mpassthru.demo.qemu import find_kernel
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.guest_config import Pattern
from mpassthru.testing.initramfs import find_program
from mpassthru.testing.netns import veth_namespace
from mpassthru.testing.qemu import QemuGuest
from mpassthru.testing.qemu_config import GuestConfig, GuestNic, VhostUserBackend
from mpassthru.testing.scenario_qemu import configure_interface, ping
from mpassthru.testing.wire import PacketWire
from mpassthru.vhost_user import VirtioFeature

ROUNDS = 5
RATE_FRAMES_PER_S = 20_000
PEER_ADDRESS = "10.77.0.1"
GUEST_ADDRESS = "10.77.0.2"
GUEST_MAC = "52:54:00:12:34:56"
NO_END = 1 << 40
PINGS_WITHOUT_END = f"(while :; do ping -A -c 100 -s 1400 {PEER_ADDRESS}; done >/dev/null 2>&1 & echo $! >/tmp/pings)"
STOP_PINGS = "kill $(cat /tmp/pings); killall ping"


@dataclass(frozen=True)
class FloodedGuest:
    """A guest that frames fly to and from."""

    guest: QemuGuest
    port: AttachedPort

    async def until_traffic(self) -> None:
        """Wait until frames go both ways that were not on their way before."""
        before = await self.port.until(lambda report: report.guest == "running")
        rx_frames, tx_frames = before.rx.frames + 1000, before.tx.frames + 10
        await self.port.until(lambda report: report.rx.frames > rx_frames and report.tx.frames > tx_frames)

    async def network_up(self) -> None:
        """Configure the guest's interface and let it ping without end."""
        await configure_interface(self.guest, f"{GUEST_ADDRESS}/24")
        await self.guest.run(PINGS_WITHOUT_END)
        await self.until_traffic()

    async def features(self) -> int:
        """Virtio features that the guest's network driver runs with."""
        text = (await self.guest.run("cat /sys/class/net/eth0/device/features")).output.strip()
        return int(text[::-1], 2)


@asynccontextmanager
async def flooded_guest(folder: Path, *, packed: bool = False) -> AsyncIterator[FloodedGuest]:
    """A QEMU guest on a port, both of which have to stay in good order until the end of the block."""
    properties = {"packed": "on"} if packed else {}
    path = folder / "port.sock"
    config = GuestConfig(
        kernel=find_kernel(),
        nics=(GuestNic(backend=VhostUserBackend(socket_path=path), mac=GUEST_MAC, properties=properties),),
        programs=(find_program("ethtool", "ethtool"),),
        extra_arguments=("-action", "reboot=reset"),
    )
    with veth_namespace() as namespace:
        namespace.run("ip", "address", "add", f"{PEER_ADDRESS}/24", "dev", namespace.peer)
        async with attached_port(namespace, path) as port:
            await port.until_said("is ready")
            async with QemuGuest(config) as guest:
                with namespace.entered():
                    wire = PacketWire(namespace.peer_ifindex)
                async with wire:
                    pattern = Pattern(destination=bytes.fromhex(GUEST_MAC.replace(":", "")), sizes=(60, 1514))
                    wire.start_sending(pattern, count=NO_END, rate_frames_per_s=RATE_FRAMES_PER_S)
                    flooded = FloodedGuest(guest, port)
                    await flooded.network_up()
                    yield flooded
                answers = await ping(guest, PEER_ADDRESS)
                assert answers.received == answers.sent
            report = await port.stop()
    assert not report.troubles
    assert report.faults == 0
    assert report.sessions == 1
    assert report.worker_restarts == 0


@pytest.mark.slow
async def test_rebooted_guest_has_its_network_again(tmp_path: Path) -> None:
    async with flooded_guest(tmp_path) as flooded:
        for _ in range(2):
            boot = (await flooded.guest.run("cat /proc/sys/kernel/random/boot_id")).output
            await flooded.guest.qmp.execute("system_reset")
            await flooded.port.until(lambda report: report.guest == "connected")
            await flooded.port.until(lambda report: report.guest == "running", timeout_s=60)
            assert (await flooded.guest.run("cat /proc/sys/kernel/random/boot_id", timeout_s=60)).output != boot
            await flooded.network_up()


@pytest.mark.slow
@pytest.mark.parametrize(
    "packed", [pytest.param(False, id="split", marks=pytest.mark.soak), pytest.param(True, id="packed")]
)
async def test_driver_unbound_and_bound_under_flood_has_its_network_again(tmp_path: Path, packed: bool) -> None:
    async with flooded_guest(tmp_path, packed=packed) as flooded:
        assert bool(await flooded.features() & VirtioFeature.VIRTIO_F_RING_PACKED) == packed
        device = (await flooded.guest.run("basename $(readlink /sys/class/net/eth0/device)")).output.strip()
        for _ in range(ROUNDS):
            await flooded.guest.run(STOP_PINGS, check=False)
            await flooded.guest.run(f"echo {device} >/sys/bus/virtio/drivers/virtio_net/unbind")
            await flooded.guest.run(f"echo {device} >/sys/bus/virtio/drivers/virtio_net/bind")
            await flooded.network_up()


@pytest.mark.slow
async def test_guest_cannot_resize_a_ring_behind_our_back(tmp_path: Path) -> None:
    """VIRTIO_F_RING_RESET is not offered: docs/decisions/0005."""
    async with flooded_guest(tmp_path) as flooded:
        assert not await flooded.features() & VirtioFeature.VIRTIO_F_RING_RESET
        refused = await flooded.guest.run("ethtool -G eth0 rx 64", check=False)
        assert refused.exit_status != 0
        await flooded.until_traffic()
