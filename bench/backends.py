"""The back-ends that are compared. Each drives, or is driven by, the same traffic, and is one process.

All but the limit have the built-in guest as their front-end: the same driver, rings and buffers for each.
"""

from __future__ import annotations

import json
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from bench.placement import Placement
from bench.wire import frame_of
from mpassthru.report import DirectionReport
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.child import ChildError, last_lines, running_child
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import GuestConfig, Source
from mpassthru.testing.netns import Namespace
from mpassthru.testing.testpmd import AfXdpPort, Testpmd, VhostPort

GUEST: Final = GuestConfig(queue_size=1024)
FRAME_MAX_BYTES: Final = 1500 + 22
"""Of the veth pair, as a port reckons it: MTU, Ethernet header and two VLAN tags."""
_INTERVAL_S: Final = 0.1
_DEADLINE_S: Final = 10.0


class Backend(Protocol):
    """A back-end that runs."""

    @property
    def pid(self) -> int:
        """Of the process whose CPU time counts."""

    @property
    def start_s(self) -> float:
        """Seconds from the start of its process until it could carry frames."""

    async def received(self) -> int:
        """Frames that have reached the guest."""

    async def sent(self) -> int:
        """Frames that the guest has handed over."""

    async def start_sending(self, frame_bytes: int, rate_frames_per_s: int | None) -> None:
        """Have the guest send."""

    async def stop_sending(self) -> None:
        """Have the guest send no more."""

    async def dropped(self) -> dict[str, int]:
        """Frames that it has dropped by now, by reason; asked for while nothing moves."""


class _WithGuest:
    """What back-ends with the built-in guest share."""

    polls = False

    def __init__(self, guest: BuiltinGuest, placement: Placement, pid: int, started_s: float) -> None:
        self.pid = pid
        self.start_s = time.monotonic() - started_s
        self._guest = guest
        self._placement = placement
        self._give_role(None)

    async def received(self) -> int:
        return self._guest.counters().rx_frames

    async def sent(self) -> int:
        return self._guest.counters().tx_posted

    async def start_sending(self, frame_bytes: int, rate_frames_per_s: int | None) -> None:
        self._give_role(Source(frames=(frame_of(frame_bytes),), rate_frames_per_s=rate_frames_per_s))

    async def stop_sending(self) -> None:
        self._give_role(None)
        await self._guest.wait_for(lambda counters: counters.tx_frames >= counters.tx_posted, deadline_s=_DEADLINE_S)

    def _give_role(self, source: Source | None) -> None:
        self._guest.start(rx="sink", source=source)
        self._placement.place_guest(backend_polls=self.polls)


class _Port(_WithGuest):
    """`mpassthru attach`; the CPU time that counts is its worker's."""

    def __init__(
        self, port: AttachedPort, guest: BuiltinGuest, placement: Placement, pid: int, started_s: float
    ) -> None:
        super().__init__(guest, placement, pid, started_s)
        self._port = port

    async def dropped(self) -> dict[str, int]:
        await self._port.news()  # may have been on its way while frames still moved
        await self._port.news()
        assert self._port.report is not None
        report = self._port.report
        return _by_reason("rx", report.rx) | _by_reason("tx", report.tx)


def _by_reason(direction: str, report: DirectionReport) -> dict[str, int]:
    return {f"{direction}: {reason}": count for reason, count in report.dropped.items()}


@asynccontextmanager
async def port(namespace: Namespace, folder: Path, placement: Placement, *, mode: str) -> AsyncIterator[Backend]:
    """A port of ours in one of its modes."""
    path, started_s = folder / "port.sock", time.monotonic()
    async with attached_port(namespace, path, "--mode", mode, interval_s=_INTERVAL_S) as attached:
        await attached.until_said("is ready")
        async with BuiltinGuest.connect(path, GUEST) as guest:
            report = await attached.until(lambda report: report.guest == "running")
            assert report.worker_pid is not None
            placement.place_backend(report.worker_pid)
            yield _Port(attached, guest, placement, report.worker_pid, started_s)


class _Testpmd(_WithGuest):
    """DPDK's vhost back-end over its AF_XDP driver."""

    polls = True

    def __init__(self, testpmd: Testpmd, guest: BuiltinGuest, placement: Placement, started_s: float) -> None:
        super().__init__(guest, placement, testpmd.pid, started_s)
        self._testpmd = testpmd

    async def dropped(self) -> dict[str, int]:
        ports = await self._testpmd.port_stats()
        counters = {
            f"{name}: {counter}": getattr(ports[index], counter)
            for index, name in enumerate(("net_af_xdp", "net_vhost"))
            for counter in ("rx_missed", "rx_no_buffer", "tx_errors")
        }
        return {name: count for name, count in counters.items() if count}


@asynccontextmanager
async def testpmd(namespace: Namespace, folder: Path, placement: Placement) -> AsyncIterator[Backend]:
    """dpdk-testpmd forwarding between the interface and the guest; its forwarding thread polls a CPU of its own."""
    path, started_s = folder / "vhost.sock", time.monotonic()
    ports = (AfXdpPort(iface=namespace.ifname), VhostPort(path=path))
    async with Testpmd(ports, cores=placement.polling_cores(), namespace=namespace) as running:
        await running.start("io")
        async with BuiltinGuest.connect(path, GUEST) as guest:
            yield _Testpmd(running, guest, placement, started_s)


class _Limit:
    """bench/limit: the same socket, without a guest."""

    def __init__(self, process: Process, started_s: float) -> None:
        self.pid = process.pid
        self.start_s = time.monotonic() - started_s
        self._process = process

    async def received(self) -> int:
        return (await self.command("read"))["rx_frames"]

    async def sent(self) -> int:
        return (await self.command("read"))["tx_frames"]

    async def start_sending(self, frame_bytes: int, rate_frames_per_s: int | None) -> None:
        await self.command(f"tx {frame_bytes} {rate_frames_per_s or 0}")

    async def stop_sending(self) -> None:
        await self.command("tx 0")

    async def dropped(self) -> dict[str, int]:
        totals = await self.command("read")
        return {f"rx: {reason}": totals[reason] for reason in ("no_buffer", "oversize", "rx_ring_full")}

    async def command(self, line: str) -> dict[str, int]:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        return await self.answer()

    async def answer(self) -> dict[str, int]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line.startswith(b"{"):
            rest = line + await self._process.stdout.read()
            raise ChildError(f"the limit's program ended: {last_lines(rest.decode(errors='replace'))}")
        totals: dict[str, Any] = json.loads(line)
        return totals


@asynccontextmanager
async def limit(namespace: Namespace, placement: Placement, *, program: Path) -> AsyncIterator[Backend]:
    """The limit: rx-drop and tx-only."""
    started_s = time.monotonic()
    arguments = (str(program), str(namespace.ifindex), str(FRAME_MAX_BYTES))
    async with running_child(*arguments, namespace=namespace, stdin=PIPE) as process:
        running = _Limit(process, started_s)
        await running.answer()
        running.start_s = time.monotonic() - started_s
        placement.place_backend(process.pid)
        yield running
