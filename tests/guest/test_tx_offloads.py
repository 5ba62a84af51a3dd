"""An unmodified Linux guest leaves checksums and segmentation to the port: it negotiates them, uses them, and can do
without.

The peer's kernel checks every checksum, for the wire is a veth pair whose offloads are off.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mpassthru.demo.qemu import find_kernel
from mpassthru.report import DirectionReport
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.figures import difference
from mpassthru.testing.initramfs import find_program
from mpassthru.testing.netns import Namespace, veth_namespace
from mpassthru.testing.qemu import QemuGuest
from mpassthru.testing.qemu_config import GuestConfig, GuestNic, VhostUserBackend
from mpassthru.testing.scenario_qemu import (
    Peer,
    configure_interface,
    iperf3,
    random_file,
    send_file_from_guest,
    send_file_to_guest,
)

GUEST_ADDRESS, PEER_ADDRESS = "10.77.0.2", "10.77.0.1"
GUEST_ADDRESS6, PEER_ADDRESS6 = "fd77::2", "fd77::1"
FILE_BYTES = 20_000_000
SECONDS = 2
STILL_REPORTS = 5
LARGE_FRAMES_MIN = 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@dataclass(frozen=True)
class Bench:
    """A guest on a port, with addresses of both families."""

    namespace: Namespace
    port: AttachedPort
    guest: QemuGuest

    @property
    def peer(self) -> Peer:
        """The other end of the wire."""
        return Peer(self.namespace, PEER_ADDRESS)

    async def features(self) -> dict[str, str]:
        """What ethtool says of the guest's interface."""
        lines = (await self.guest.run("ethtool -k eth0")).output
        return dict(re.findall(r"^\s*([\w-]+): (\w+)", lines, re.MULTILINE))

    async def switch(self, **features: bool) -> None:
        """Switch features of the guest's interface."""
        words = " ".join(f"{name} {'on' if on else 'off'}" for name, on in features.items())
        await self.guest.run(f"ethtool -K eth0 {words}")

    async def send(self, address: str) -> DirectionReport:
        """Send TCP for a while; what the port counted meanwhile."""
        before = await self.at_rest()
        moved = await iperf3(self.guest, Peer(self.namespace, address), "tx", duration_s=SECONDS)
        assert moved.bytes > 0
        return difference(await self.at_rest(), before)

    async def at_rest(self) -> DirectionReport:
        """What the port has counted, once it counts no more: the last segments of a connection may come late."""
        before, still = await self.port.until(lambda report: report.guest == "running"), 0
        while still < STILL_REPORTS:
            await self.port.news()
            report = await self.port.until(lambda report: report.guest == "running")
            before, still = report, still + 1 if report.tx == before.tx else 0
        return before.tx

    def bad_checksums(self) -> int:
        """Segments that the peer's kernel threw away for their checksum."""
        lines = self.namespace.run("cat", "/proc/net/snmp", "/proc/net/snmp6").splitlines()
        names, values = (line.split() for line in lines if line.startswith("Tcp:"))
        return int(values[names.index("InCsumErrors")])


@asynccontextmanager
async def bench(folder: Path, *options: str) -> AsyncIterator[Bench]:
    """A guest on a port, which stays in good order until the end of the block."""
    path = folder / "port.sock"
    config = GuestConfig(
        kernel=find_kernel(),
        nics=(GuestNic(backend=VhostUserBackend(socket_path=path)),),
        programs=(find_program("ethtool", "ethtool"), find_program("iperf3", "iperf3")),
    )
    with veth_namespace() as namespace:
        namespace.run("sysctl", "-qw", f"net.ipv6.conf.{namespace.peer}.disable_ipv6=0")
        namespace.run("ip", "address", "add", f"{PEER_ADDRESS}/24", "dev", namespace.peer)
        namespace.run("ip", "address", "add", f"{PEER_ADDRESS6}/64", "dev", namespace.peer, "nodad")
        async with attached_port(namespace, path, *options) as port:
            await port.until_said("is ready")
            async with QemuGuest(config) as guest:
                await guest.run("echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad")
                await configure_interface(guest, f"{GUEST_ADDRESS}/24")
                await guest.run(f"ip address add {GUEST_ADDRESS6}/64 dev eth0")
                yield Bench(namespace, port, guest)
            report = await port.stop()
    assert not report.troubles
    assert report.faults == 0


async def test_linux_guest_uses_checksum_and_segmentation_offload_and_can_do_without(
    tmp_path: Path, record_figure: Callable[[str, object], None]
) -> None:
    async with bench(tmp_path) as it:
        features = await it.features()
        assert features["tx-checksumming"] == features["tcp-segmentation-offload"] == "on"
        assert features["tx-tcp6-segmentation"] == features["tx-tcp-ecn-segmentation"] == "on"

        ipv4, ipv6 = await it.send(PEER_ADDRESS), await it.send(PEER_ADDRESS6)
        await it.switch(tso=False)
        checksums = await it.send(PEER_ADDRESS)
        await it.switch(tx=False)
        nothing = await it.send(PEER_ADDRESS)
        await it.switch(tx=True, tso=True)
        again = await it.send(PEER_ADDRESS)

        assert ipv4.offloaded["tso4"] >= LARGE_FRAMES_MIN
        assert ipv6.offloaded["tso6"] >= LARGE_FRAMES_MIN
        assert again.offloaded["tso4"] >= LARGE_FRAMES_MIN
        assert checksums.offloaded.keys() == {"checksum"}
        for with_headers in (ipv4, ipv6, checksums, again):
            assert with_headers.header_split >= 0.95 * with_headers.frames
            assert with_headers.copied_bytes == with_headers.header_bytes
            assert with_headers.bounced == with_headers.dropped == {}
        assert nothing.offloaded == {}
        assert (nothing.direct, nothing.header_split, nothing.copied_bytes) == (nothing.frames, 0, 0)

        file = await send_file_to_guest(it.guest, it.peer, random_file(FILE_BYTES))
        back = await send_file_from_guest(it.guest, it.peer)
        assert file.intact
        assert back.intact
        assert it.bad_checksums() == 0
    for name, figures in (("tso4", ipv4), ("tso6", ipv6), ("checksum", checksums), ("none", nothing)):
        record_figure(name, {"frames": figures.frames, "bytes": figures.bytes, **figures.offloaded})


async def test_guest_to_which_nothing_is_offered_makes_its_own_checksums(tmp_path: Path) -> None:
    async with bench(tmp_path, "--tx-offloads", "off") as it:
        features = await it.features()
        assert features["tx-checksumming"] == features["tcp-segmentation-offload"] == "off"
        sent = await it.send(PEER_ADDRESS)
        assert (sent.direct, sent.header_split, sent.copied_bytes) == (sent.frames, 0, 0)
        assert it.bad_checksums() == 0
