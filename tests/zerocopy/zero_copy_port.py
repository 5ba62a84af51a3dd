"""A port in zero-copy mode, the far end of its wire, and what one guest's stay on it amounted to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from mpassthru.report import DirectionReport
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.figures import difference
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import DEFAULT_FEATURES, BufferLayout, GuestConfig, Pattern, Region, Source
from mpassthru.testing.netns import Namespace
from mpassthru.testing.wire import PacketWire
from mpassthru.vhost_user.features import VirtioFeature

HUGE: Final = Region(backing="huge-memfd", size_bytes=16 << 20)
HASH_REPORT: Final = DEFAULT_FEATURES | VirtioFeature.VIRTIO_NET_F_HASH_REPORT
NOT_MERGEABLE: Final = DEFAULT_FEATURES & ~VirtioFeature.VIRTIO_NET_F_MRG_RXBUF
READY_TIMEOUT_S: Final = 90
STOP_TIMEOUT_S: Final = 60
PORTION: Final = 64
"""Frames on their way at once: fewer than any ring or queue on the way holds."""
FRAME_SIZES: Final = tuple(range(60, 1515))
EDGES: Final = (60, 61, 64, 127, 128, 129, 1023, 1024, 1025, 1499, 1500, 1501, 1513, 1514)
SOME_SIZES: Final = tuple(sorted({*EDGES, *FRAME_SIZES[::29]}))


def huge_guest(**changes: object) -> GuestConfig:
    """A guest on huge pages, with canaries wherever nobody may write."""
    return replace(GuestConfig(regions=(HUGE,), canaries=True), **changes)  # type: ignore[arg-type]


GUEST_KINDS: Final = {
    # drivers/net/virtio_net.c: get_mergeable_buf_len, add_recvbuf_small
    "linux-default": huge_guest(rx=BufferLayout(pieces=(1536,))),
    "linux-hash-report": huge_guest(features=HASH_REPORT, rx=BufferLayout(pieces=(1600,))),
    "linux-not-mergeable": huge_guest(features=NOT_MERGEABLE, rx=BufferLayout(pieces=(1530,), stride_bytes=2048)),
    # DPDK: mbufs of 2048 bytes behind 128 of headroom, which has the header
    "dpdk": huge_guest(rx=BufferLayout(pieces=(2060,), stride_bytes=2368, offset_bytes=244)),
    "dpdk-not-mergeable": huge_guest(
        features=NOT_MERGEABLE, rx=BufferLayout(pieces=(2060,), stride_bytes=2368, offset_bytes=244)
    ),
}


@dataclass
class Stay:
    """What the port counted while a guest was there; filled in when it has left."""

    guest: BuiltinGuest
    rx: DirectionReport = field(default_factory=DirectionReport)
    tx: DirectionReport = field(default_factory=DirectionReport)


@dataclass
class ZeroCopyPort:
    """A port, and a checked wire at the other end."""

    ifname: str
    socket_path: Path
    attached: AttachedPort
    peer: PacketWire
    _seed: int = 100

    @property
    def may_bounce(self) -> set[str]:
        """Why frames may leave the direct path when more come than the guest is quick to take."""
        return {"few_buffers"} if self.ifname == "igb" else set()

    @asynccontextmanager
    async def stay(self, config: GuestConfig, *, mode: str = "zero-copy") -> AsyncIterator[Stay]:
        """A guest for the length of a block, in `mode` at its end; then virtqueues are stopped and the books closed.

        The mode is what the socket's XDP_OPTIONS said after its bind.
        """
        before = await self.figures()
        async with BuiltinGuest.connect(self.socket_path, config, timeout_s=30) as guest:
            stay = Stay(guest)
            yield stay
            await self.attached.until(lambda report: report.mode == mode)
            await guest.stop()
            assert guest.violations() == {}
            stay.rx, stay.tx = (difference(now, then) for now, then in zip(await self.figures(), before, strict=True))

    def new_seed(self) -> int:
        """A stream that nothing has seen yet."""
        self._seed += 1
        return self._seed

    async def receive(self, guest: BuiltinGuest, sizes: tuple[int, ...], count: int | None = None) -> None:
        """Send frames to the guest, in portions that nothing on the way can lose; they arrive byte for byte."""
        count = len(sizes) if count is None else count
        before = guest.counters()
        pattern = Pattern(seed=self.new_seed(), sizes=sizes)
        for first in range(0, count, PORTION):
            sent = min(PORTION, count - first)
            await self.peer.send(pattern, count=sent, first_sequence=first)
            arrived = before.rx_frames + first + sent
            await guest.wait_for(lambda c, arrived=arrived: c.rx_frames >= arrived, deadline_s=10)
        after = guest.counters()
        assert after.check_good - before.check_good == count, after
        assert after.check_corrupt == after.check_missing == after.check_duplicate == 0, after

    async def send(self, guest: BuiltinGuest, sizes: tuple[int, ...], count: int | None = None) -> None:
        """Send frames from the guest; they arrive byte for byte."""
        count = len(sizes) if count is None else count
        good = self.peer.counters().check_good + count
        pattern = Pattern(seed=self.new_seed(), sizes=sizes)
        guest.start(rx="check", source=Source(pattern=pattern, count=count, first_sequence=0))
        after = await self.peer.wait_for(lambda c: c.check_good >= good, deadline_s=10 + count / 500)
        assert after.check_corrupt == after.check_missing == after.check_duplicate == 0, after

    async def figures(self) -> tuple[DirectionReport, DirectionReport]:
        """The port's figures of now: those printed next may be of a moment ago, the ones after are not."""
        await self.attached.news()
        await self.attached.news()
        assert self.attached.report is not None
        return self.attached.report.rx, self.attached.report.tx


class PortSlot:
    """Holds the port of now, so that tests which want the same one share it: in the machine, a start takes seconds."""

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path
        self._key: tuple[str, ...] = ()
        self._port: ZeroCopyPort | None = None
        self._resources = AsyncExitStack()

    async def attach(self, wire: Namespace, *options: str) -> ZeroCopyPort:
        """The port on this wire with these options; another one that is there ends first."""
        key = (wire.ifname, *options)
        if self._port is None or self._key != key:
            await self.leave()
            attached = await self._resources.enter_async_context(
                attached_port(wire, self._path, "--mode", "zero-copy", *options)
            )
            await attached.until_said("ready", timeout_s=READY_TIMEOUT_S)
            self._resources.push_async_callback(attached.stop, timeout_s=STOP_TIMEOUT_S)
            peer = await self._resources.enter_async_context(PacketWire(wire.peer_ifindex))
            self._key, self._port = key, ZeroCopyPort(wire.ifname, self._path, attached, peer)
        return self._port

    async def leave(self) -> None:
        """End the port in good order, if there is one."""
        self._port = None
        await self._resources.aclose()
