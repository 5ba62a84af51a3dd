"""An unmodified Linux guest takes frames merged: what it receives is intact, and what that costs it and the port, with
merging and without, is in one report.

The guest's kernel checks nothing of what was merged: files over TCP say what is lost.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.cpu import cpu_time
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
SECONDS = 3
LARGE_PACKETS_MIN = 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@dataclass(frozen=True)
class Received:
    """What one run of iperf3 brought, and what it cost."""

    counted: DirectionReport
    figures: dict[str, float]


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

    async def receive(self, address: str) -> Received:
        """Receive TCP for a while."""
        before = await self.port.until(lambda report: report.guest == "running")
        assert before.worker_pid is not None
        pids = {"guest": self.guest.pid, "port": before.worker_pid}
        spent = {name: -cpu_time(pid).total_s for name, pid in pids.items()}
        moved = await iperf3(self.guest, Peer(self.namespace, address), "rx", duration_s=SECONDS)
        for name, pid in pids.items():
            spent[name] += cpu_time(pid).total_s
        assert moved.bytes > 0
        after = await self.port.until(lambda report: report.rx.bytes >= before.rx.bytes + moved.bytes)
        counted = difference(after.rx, before.rx)
        gigabytes = moved.bytes / 1e9
        figures = {f"{name}_cpu_s_per_gb": round(seconds / gigabytes, 2) for name, seconds in spent.items()}
        large = counted.offloaded.get("gro", 0)
        packets = counted.frames - counted.bounced.get("merged", 0) + large
        figures |= {"gbit_per_s": round(moved.bits_per_s / 1e9, 2)}
        figures |= {"frames_per_packet": round(counted.frames / packets, 1)}
        return Received(counted, figures)


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


async def test_linux_guest_takes_frames_merged_and_can_do_without(
    tmp_path: Path, record_figure: Callable[[str, object], None]
) -> None:
    figures: dict[str, dict[str, dict[str, float]]] = {"ipv4": {}, "ipv6": {}}
    for choice in ("off", "on"):
        async with bench(tmp_path, "--rx-offloads", choice) as it:
            features = await it.features()
            ipv4, ipv6 = await it.receive(PEER_ADDRESS), await it.receive(PEER_ADDRESS6)
            file = await send_file_to_guest(it.guest, it.peer, random_file(FILE_BYTES))
            back = await send_file_from_guest(it.guest, it.peer)
        assert file.intact
        assert back.intact
        for family, received in (("ipv4", ipv4), ("ipv6", ipv6)):
            figures[family][choice] = received.figures
            if choice == "on":
                assert features["rx-checksumming"] == "on"
                assert received.counted.offloaded["gro"] >= LARGE_PACKETS_MIN
                assert set(received.counted.bounced) == {"merged"}
            else:
                assert received.counted.offloaded == received.counted.bounced == {}
                assert received.counted.copied_bytes == 0
    for family, beside in figures.items():
        record_figure(f"iperf3 rx {family}", beside)
