"""Frames longer than a chunk of the UMEM: whole in the guest's buffers and on the wire, copied no more than said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from frames_in_place import frames_of, packet_socket, proving, receive_all, send_all

from mpassthru.netdev import MTU_MAX_BYTES
from mpassthru.rules import LINUX_BUFFER_ROOM_BYTES as ROOM
from mpassthru.testing.attached_port import attached_port
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import DEFAULT_FEATURES, BufferLayout, GuestConfig
from mpassthru.testing.netns import Namespace, veth_namespace
from mpassthru.vhost_user.features import VirtioFeature

MTU = 9000
LONGEST = MTU + 14
AROUND_PIECES = {ROOM * pieces + more for pieces in range(1, 6) for more in (-1, 0, 1)}
SIZES = sorted({*range(60, LONGEST, 97), *AROUND_PIECES, LONGEST})
LONG = [size for size in SIZES if size > ROOM]
NOT_MERGEABLE = DEFAULT_FEATURES & ~VirtioFeature.VIRTIO_NET_F_MRG_RXBUF
WINDOW = 8
"""Frames on their way at once: their pieces fit the fill ring of a guest with 256 buffers."""

RX_MERGED = {
    "linux-default": BufferLayout(pieces=(1536,)),
    "linux-after-long-frames": BufferLayout(pieces=(4096,)),
    "odd-addresses": BufferLayout(pieces=(1537,), stride_bytes=1539, offset_bytes=3),
    "dpdk": BufferLayout(pieces=(2176,)),
}
RX_BOUNCED = {
    "small-buffers": (GuestConfig(rx=BufferLayout(pieces=(256,), count=256)), "short_buffer"),
    "not-mergeable": (GuestConfig(features=NOT_MERGEABLE, rx=BufferLayout(pieces=(9100,))), "long_frame"),
    "big-mode": (
        GuestConfig(features=NOT_MERGEABLE, rx=BufferLayout(pieces=(12, 4080, 4096, 4096), indirect=True)),
        "long_frame",
    ),
}
TX_DIRECT = {
    "one-piece": BufferLayout(pieces=(9100,)),
    "odd-addresses": BufferLayout(pieces=(9100,), stride_bytes=9101, offset_bytes=1),
    "header-apart": BufferLayout(pieces=(12, 9100), stride_bytes=9102, offset_bytes=2),
    "pages": BufferLayout(pieces=(12 + 66, 4096, 4096, 4096), indirect=True, stride_bytes=4099),
}


@pytest.fixture(scope="module", params=["native", "generic"])
def wire(request: pytest.FixtureRequest) -> Iterator[tuple[Namespace, str]]:
    with veth_namespace(mtu=MTU) as namespace:
        yield namespace, request.param


@pytest.mark.parametrize("layout", RX_MERGED)
async def test_first_piece_lands_in_the_guests_buffer_and_the_rest_is_moved_once(
    layout: str, wire: tuple[Namespace, str], tmp_path: Path
) -> None:
    namespace, xdp = wire
    async with attached_port(namespace, tmp_path / "s", "--xdp", xdp) as port:
        await port.until_said("ready")
        with packet_socket(namespace) as packets:
            config = proving(GuestConfig(rx=RX_MERGED[layout]), len(SIZES))
            async with BuiltinGuest.connect(tmp_path / "s", config) as guest:
                await receive_all(guest, packets, frames_of(SIZES, seed=1), window=WINDOW, tails=False)
        report = await port.stop()
    assert (report.rx.frames, report.rx.bytes, report.rx.dropped) == (len(SIZES), sum(SIZES), {})
    assert report.rx.direct == len(SIZES) - len(LONG)
    assert report.rx.bounced == {"long_frame": len(LONG)}
    assert report.rx.copied_bytes == sum(size - ROOM for size in LONG)


@pytest.mark.parametrize("layout", RX_BOUNCED)
async def test_long_frame_for_other_buffers_is_copied_once_and_counted(
    layout: str, wire: tuple[Namespace, str], tmp_path: Path
) -> None:
    namespace, xdp = wire
    config, reason = RX_BOUNCED[layout]
    sizes = SIZES[::3]
    async with attached_port(namespace, tmp_path / "s", "--xdp", xdp) as port:
        await port.until_said("ready")
        with packet_socket(namespace) as packets:
            async with BuiltinGuest.connect(tmp_path / "s", proving(config, len(sizes))) as guest:
                # 256 buffers of 256 bytes hold seven of the longest.
                await receive_all(guest, packets, frames_of(sizes, seed=2), window=4)
        report = await port.stop()
    assert report.rx.bounced == {reason: len(sizes)}
    assert report.rx.copied_bytes == report.rx.bytes == sum(sizes)
    assert report.rx.dropped == {}


@pytest.mark.parametrize("layout", TX_DIRECT)
async def test_long_frame_leaves_from_the_guests_buffers_without_a_copy(
    layout: str, wire: tuple[Namespace, str], tmp_path: Path
) -> None:
    namespace, xdp = wire
    async with attached_port(namespace, tmp_path / "s", "--xdp", xdp) as port:
        await port.until_said("ready")
        with packet_socket(namespace) as packets:
            config = proving(GuestConfig(tx=TX_DIRECT[layout]), 0)
            async with BuiltinGuest.connect(tmp_path / "s", config) as guest:
                await send_all(guest, packets, frames_of(SIZES, seed=3))
        report = await port.stop()
    assert (report.tx.direct, report.tx.frames, report.tx.bytes) == (len(SIZES), len(SIZES), sum(SIZES))
    assert report.tx.copied_bytes == 0
    assert report.tx.bounced == report.tx.dropped == {}


async def test_long_frame_in_too_many_pieces_is_copied_and_leaves_whole(
    wire: tuple[Namespace, str], tmp_path: Path
) -> None:
    namespace, xdp = wire
    sizes = [LONGEST - 3, LONGEST]
    config = proving(GuestConfig(tx=BufferLayout(pieces=(12, *(482,) * 19), stride_bytes=485, offset_bytes=1)), 0)
    async with attached_port(namespace, tmp_path / "s", "--xdp", xdp) as port:
        await port.until_said("ready")
        with packet_socket(namespace) as packets:
            async with BuiltinGuest.connect(tmp_path / "s", config) as guest:
                await send_all(guest, packets, frames_of(sizes, seed=4))
        report = await port.stop()
    assert report.tx.bounced == {"too_many_pieces": 2}
    assert report.tx.copied_bytes == sum(sizes)


async def test_frame_longer_than_the_mtu_is_dropped_and_counted_and_its_buffers_take_others(tmp_path: Path) -> None:
    with veth_namespace(mtu=2000) as namespace, packet_socket(namespace) as packets:
        namespace.run("ip", "link", "set", "dev", namespace.peer, "mtu", "9000")
        async with attached_port(namespace, tmp_path / "s", "--xdp", "generic") as port:
            await port.until_said("ready")
            config = proving(GuestConfig(), 2)
            async with BuiltinGuest.connect(tmp_path / "s", config) as guest:
                guest.start(rx="sink")
                short, long = frames_of([2014, 9014], seed=5)
                # A veth lets nothing through that is longer than the other end's MTU: one that grew later.
                namespace.run("ip", "link", "set", "dev", namespace.ifname, "mtu", "9000")
                for frame in (short, long, short):
                    packets.send(frame)
                await guest.wait_for(lambda c: c.rx_frames == 2)
                report = await port.until(lambda r: r.rx.frames == 2)
                assert guest.take_captured() == [short, short]
    assert report.rx.dropped == {"oversize": 1}


async def test_largest_mtu_works_both_ways(tmp_path: Path) -> None:
    sizes = [MTU_MAX_BYTES + 14] * 3
    with veth_namespace(mtu=MTU_MAX_BYTES) as namespace, packet_socket(namespace) as packets:
        async with attached_port(namespace, tmp_path / "s") as port:
            await port.until_said("ready")
            config = proving(GuestConfig(tx=BufferLayout(pieces=(9300,))), len(sizes))
            async with BuiltinGuest.connect(tmp_path / "s", config) as guest:
                await receive_all(guest, packets, frames_of(sizes, seed=6), tails=False)
            await port.until_idle(after_sessions=1)
            async with BuiltinGuest.connect(tmp_path / "s", config) as guest:
                await send_all(guest, packets, frames_of(sizes, seed=7))


async def test_mode_packet_carries_long_frames(tmp_path: Path) -> None:
    with veth_namespace(mtu=MTU) as namespace, packet_socket(namespace) as packets:
        async with attached_port(namespace, tmp_path / "s", "--mode", "packet") as port:
            await port.until_said("ready")
            config = proving(GuestConfig(tx=BufferLayout(pieces=(9100,))), len(LONG))
            async with BuiltinGuest.connect(tmp_path / "s", config) as guest:
                await receive_all(guest, packets, frames_of(LONG, seed=8))
            await port.until_idle(after_sessions=1)
            async with BuiltinGuest.connect(tmp_path / "s", config) as guest:
                await send_all(guest, packets, frames_of(LONG, seed=9))
