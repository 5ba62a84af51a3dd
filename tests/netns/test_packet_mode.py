"""Mode `packet`: no XDP, frames copied, none lost, all counted; the socket stays on its interface."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mpassthru.broker.packet import create_packet_socket
from mpassthru.errors import HostError
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.child import ChildError
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import DEFAULT_FEATURES, BufferLayout, GuestConfig, Pattern, Source
from mpassthru.testing.netns import Namespace
from mpassthru.testing.wire import PacketWire
from mpassthru.vhost_user.features import VirtioFeature

SIZES = (60, 61, 590, 1513, 1514)
FRAMES = 4000
PORTION = 128

LAYOUTS = {
    "one-piece": BufferLayout(),
    "header-apart": BufferLayout(pieces=(12, 2048)),
    "merged": BufferLayout(pieces=(256,), stride_bytes=257, offset_bytes=1),
    "odd-chains": BufferLayout(pieces=(7, 13, 700, 900), indirect=True),
}


@pytest.fixture(params=LAYOUTS)
def config(request: pytest.FixtureRequest) -> GuestConfig:
    layout = LAYOUTS[request.param]
    return GuestConfig(rx=layout, tx=layout if len(layout.pieces) > 1 else BufferLayout(), canaries=True)


@asynccontextmanager
async def packet_port(
    veth: Namespace, folder: Path, config: GuestConfig | None = None
) -> AsyncIterator[tuple[AttachedPort, BuiltinGuest]]:
    async with attached_port(veth, folder / "s", "--mode", "packet") as port:
        await port.until_said("is ready")
        async with BuiltinGuest.connect(folder / "s", config) as guest:
            await port.until(lambda report: report.guest == "running" and report.mode == "packet")
            yield port, guest


async def test_every_frame_arrives_intact_both_ways_and_is_counted_as_copied(
    veth: Namespace, tmp_path: Path, config: GuestConfig
) -> None:
    source = Source(pattern=Pattern(seed=2, sizes=SIZES), count=FRAMES, rate_frames_per_s=50_000)
    async with PacketWire(veth.peer_ifindex) as wire, packet_port(veth, tmp_path, config) as (port, guest):
        guest.start(rx="check", source=source)
        await wire.send_in_portions(
            Pattern(seed=1, sizes=SIZES), count=FRAMES, arrived=lambda: guest.counters().rx_frames, portion=PORTION
        )
        await guest.wait_for(lambda counters: counters.tx_frames == FRAMES)
        on_wire = await wire.wait_for(lambda counters: counters.received + counters.kernel_drops >= FRAMES)
        report = await port.until(lambda report: report.rx.frames == report.tx.frames == FRAMES)
        counted = guest.counters()
        await guest.stop()
        assert not guest.violations()
        assert guest.check_canaries() == 0
    assert (counted.check_good, counted.check_corrupt, counted.check_reordered) == (FRAMES, 0, 0)
    assert (on_wire.check_good + on_wire.kernel_drops, on_wire.check_corrupt) == (FRAMES, 0)
    assert report.rx.bounced == report.tx.bounced == {"packet_mode": FRAMES}
    assert report.rx.direct == report.tx.direct == 0
    assert report.rx.copied_bytes == report.rx.bytes
    assert report.tx.copied_bytes == 0
    assert report.rx.dropped == report.tx.dropped == {}
    assert report.xdp_mode == "no"
    assert veth.run("ip", "-d", "link", "show", veth.ifname).count("xdp") == 0


async def test_frames_wait_for_the_guests_buffers(veth: Namespace, tmp_path: Path) -> None:
    """More frames than the guest has buffers, while it does not look: none is lost, and the port sleeps."""
    frames = 900
    config = GuestConfig(queue_size=64)
    async with PacketWire(veth.peer_ifindex) as wire, packet_port(veth, tmp_path, config) as (port, guest):
        await wire.send(Pattern(), count=frames)
        await port.until(lambda report: report.rx.frames == config.queue_size)
        guest.start(rx="check")
        counted = await guest.wait_for(lambda counters: counters.rx_frames == frames)
    assert (counted.check_good, counted.check_missing) == (frames, 0)


@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize("pieces", [(256,), (12, 500), (12, 200, 300)])
async def test_frame_longer_than_all_that_a_guest_can_post_is_dropped_and_others_go_on(
    veth: Namespace, tmp_path: Path, pieces: tuple[int, ...], layout: str
) -> None:
    features = DEFAULT_FEATURES | (VirtioFeature.VIRTIO_F_RING_PACKED if layout == "packed" else 0)
    config = GuestConfig(queue_size=4, features=features, rx=BufferLayout(pieces=pieces), capture_frames=2)
    longest = sum(pieces) * (config.queue_size // len(pieces)) - 12
    short, whole, long = (bytes(6) + bytes(range(6)) + bytes(size - 12) for size in (60, longest, longest + 1))
    async with PacketWire(veth.peer_ifindex) as wire, packet_port(veth, tmp_path, config) as (port, guest):
        guest.start(rx="sink")
        for frame in (long, short, whole):
            wire.send_frame(frame)
        await guest.wait_for(lambda counters: counters.rx_frames == 2)
        report = await port.until(lambda report: report.rx.frames == 2)
        assert guest.take_captured() == [short, whole]
        assert not guest.violations()
    assert report.rx.dropped == {"buffer_too_small": 1}


async def test_vlan_tag_that_the_kernel_took_off_is_put_back(veth: Namespace, tmp_path: Path) -> None:
    tagged = b"\x02\0\0\0\0\1" + b"\x02\0\0\0\0\2" + struct.pack("!HHH", 0x8100, 0x6007, 0x88B5) + bytes(range(64))
    config = GuestConfig(capture_frames=1)
    async with PacketWire(veth.peer_ifindex) as wire, packet_port(veth, tmp_path, config) as (_, guest):
        guest.start(rx="sink")
        wire.send_frame(tagged)
        await guest.wait_for(lambda counters: counters.rx_frames == 1)
        assert guest.take_captured() == [tagged]


async def test_frames_that_cannot_be_sent_are_dropped_by_reason_and_others_go_on(
    veth: Namespace, tmp_path: Path
) -> None:
    good, runt, oversize = bytes(60), bytes(10), bytes(1900)
    source = Source(frames=(good, runt, good, oversize), count=400)
    async with packet_port(veth, tmp_path) as (port, guest):
        guest.start(source=source)
        report = await port.until(lambda report: report.tx.frames == 200)
        await guest.wait_for(lambda counters: counters.tx_frames == 400)
        assert not guest.violations()
    assert report.tx.dropped == {"runt": 100, "oversize": 100}


async def test_guest_may_come_and_go(veth: Namespace, tmp_path: Path) -> None:
    async with PacketWire(veth.peer_ifindex) as wire, attached_port(veth, tmp_path / "s", "--mode", "packet") as port:
        await port.until_said("is ready")
        for round_ in range(1, 4):
            async with BuiltinGuest.connect(tmp_path / "s") as guest:
                guest.start(rx="sink")
                await port.until(lambda report: report.guest == "running")
                await wire.send_in_portions(Pattern(), count=100, arrived=lambda: guest.counters().rx_frames)
                await guest.stop()
                await guest.start_device()
                guest.start(rx="sink")
                await wire.send_in_portions(Pattern(), count=100, arrived=lambda: guest.counters().rx_frames)
            await port.until(lambda report, goal=200 * round_: report.guest == "waiting" and report.rx.frames == goal)


@pytest.mark.parametrize("vring", [0, 1])
async def test_a_broken_ring_stops_its_own_queue_and_not_the_other(veth: Namespace, tmp_path: Path, vring: int) -> None:
    async with PacketWire(veth.peer_ifindex) as wire, packet_port(veth, tmp_path) as (port, guest):
        ring = guest.ring(vring)
        ring.set_avail_entry(ring.avail_idx, ring.size)  # no such head
        ring.set_avail_idx(ring.avail_idx + 1)
        ring.kick()
        if vring == 0:
            await wire.send(Pattern(), count=ring.size + 1)
        await port.until(lambda report: report.faults == 1)
        if vring == 0:
            guest.start(rx="idle", source=Source(pattern=Pattern(), count=50), queue_pair=0)
            await port.until(lambda report: report.tx.frames == 50)
        else:
            await wire.send(Pattern(), count=50)
            await port.until(lambda report: report.rx.frames == 50)


@pytest.mark.parametrize("options", [("--queues", "2"), ("--steer", "mac", "--mac", "02:00:00:00:00:01")])
async def test_options_that_need_xdp_are_refused(veth: Namespace, tmp_path: Path, options: tuple[str, ...]) -> None:
    async with attached_port(veth, tmp_path / "s", "--mode", "packet", *options) as port:
        with pytest.raises(ChildError, match="mode packet has"):
            await port.until_said("is ready")


def test_socket_cannot_be_taken_to_another_interface(veth: Namespace) -> None:
    sock = create_packet_socket(veth.ifindex)
    with sock, pytest.raises(OSError, match="Invalid argument"):
        sock.bind((veth.peer, 3))


def test_no_socket_without_an_interface(veth: Namespace) -> None:
    with pytest.raises(HostError, match="is the interface there"):
        create_packet_socket(veth.ifindex + 1000)
    assert socket.if_nametoindex(veth.ifname) == veth.ifindex
