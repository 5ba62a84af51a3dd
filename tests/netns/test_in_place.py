"""Frames are where the guest posted room for them, byte for byte, and nothing else in its memory changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from frames_in_place import WINDOW, frames_of, packet_socket, proving, receive_all, send_all

from mpassthru.testing.attached_port import attached_port
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import DEFAULT_FEATURES, BufferLayout, GuestConfig, Region
from mpassthru.testing.netns import Namespace, veth_namespace
from mpassthru.vhost_user.features import VirtioFeature

SIZES = range(60, 1515)
NOT_MERGEABLE = DEFAULT_FEATURES & ~VirtioFeature.VIRTIO_NET_F_MRG_RXBUF
LEGACY = NOT_MERGEABLE & ~VirtioFeature.VIRTIO_F_VERSION_1
PACKED = DEFAULT_FEATURES | VirtioFeature.VIRTIO_F_RING_PACKED

RX_DIRECT = {
    "linux-default": GuestConfig(rx=BufferLayout(pieces=(1536,))),
    "odd-addresses": GuestConfig(rx=BufferLayout(pieces=(1530,), stride_bytes=1531, offset_bytes=3)),
    "not-mergeable": GuestConfig(features=NOT_MERGEABLE, rx=BufferLayout(pieces=(1530,))),
    "header-apart": GuestConfig(rx=BufferLayout(pieces=(12, 1518), stride_bytes=1519, offset_bytes=1)),
    "legacy-header": GuestConfig(features=LEGACY, rx=BufferLayout(pieces=(10, 1600))),
    "indirect": GuestConfig(rx=BufferLayout(pieces=(12, 2048), indirect=True)),
    "packed": GuestConfig(features=PACKED, queue_size=251, rx=BufferLayout(pieces=(1536,))),
    "packed-header-apart": GuestConfig(features=PACKED, rx=BufferLayout(pieces=(12, 1518), stride_bytes=1519)),
    "packed-indirect": GuestConfig(features=PACKED, rx=BufferLayout(pieces=(12, 2048), indirect=True)),
    "second-region": GuestConfig(
        regions=(Region(size_bytes=4 << 20), Region(guest_phys_address=0x1_0000_0000, size_bytes=8 << 20)),
        rx=BufferLayout(pieces=(1536,), region=1),
    ),
}
RX_BOUNCED = {
    "small-buffers": (GuestConfig(rx=BufferLayout(pieces=(256,))), "short_buffer"),
    "one-byte-short": (GuestConfig(rx=BufferLayout(pieces=(1529,))), "short_buffer"),
    "split-buffers": (GuestConfig(rx=BufferLayout(pieces=(700, 30, 1000), offset_bytes=5)), "split_buffer"),
    "packed-small": (GuestConfig(features=PACKED, queue_size=251, rx=BufferLayout(pieces=(256,))), "short_buffer"),
    "split-header": (GuestConfig(features=NOT_MERGEABLE, rx=BufferLayout(pieces=(7, 5, 1600))), "split_buffer"),
}
TX_DIRECT = {
    "one-piece": GuestConfig(tx=BufferLayout(pieces=(2048,))),
    "odd-addresses": GuestConfig(tx=BufferLayout(pieces=(2048,), stride_bytes=2049, offset_bytes=1)),
    "header-apart": GuestConfig(tx=BufferLayout(pieces=(12, 1600), stride_bytes=1601)),
    "scattered": GuestConfig(tx=BufferLayout(pieces=(12, *(191,) * 8), stride_bytes=211, offset_bytes=7)),
    "indirect": GuestConfig(tx=BufferLayout(pieces=(12, 31, 1600), stride_bytes=1777, indirect=True)),
    "legacy-header": GuestConfig(features=LEGACY, tx=BufferLayout(pieces=(10, 1600))),
    "packed": GuestConfig(features=PACKED, tx=BufferLayout(pieces=(2048,))),
    "packed-scattered": GuestConfig(
        features=PACKED, queue_size=251, tx=BufferLayout(pieces=(12, *(191,) * 8), stride_bytes=211, offset_bytes=7)
    ),
    "packed-indirect": GuestConfig(
        features=PACKED, tx=BufferLayout(pieces=(12, 31, 1600), stride_bytes=1777, indirect=True)
    ),
}


@pytest.fixture(scope="module", params=["native", "generic"])
def wire(request: pytest.FixtureRequest) -> Iterator[tuple[Namespace, str]]:
    with veth_namespace() as namespace:
        yield namespace, request.param


@pytest.mark.parametrize("layout", RX_DIRECT)
async def test_frame_of_every_size_lands_in_the_posted_buffer_without_a_copy(
    layout: str, wire: tuple[Namespace, str], tmp_path: Path
) -> None:
    namespace, xdp = wire
    path = tmp_path / "port.sock"
    async with attached_port(namespace, path, "--xdp", xdp) as port:
        await port.until_said("ready")
        with packet_socket(namespace) as packets:
            async with BuiltinGuest.connect(path, proving(RX_DIRECT[layout], len(SIZES))) as guest:
                await receive_all(guest, packets, frames_of(SIZES, seed=1))
        report = await port.stop()
    assert report.rx.direct == report.rx.frames == len(SIZES)
    assert report.rx.bytes == sum(SIZES)
    assert report.rx.copied_bytes == 0
    assert report.rx.bounced == report.rx.dropped == {}


@pytest.mark.parametrize("layout", RX_BOUNCED)
async def test_frame_that_does_not_fit_in_one_piece_is_copied_once_and_counted(
    layout: str, wire: tuple[Namespace, str], tmp_path: Path
) -> None:
    namespace, xdp = wire
    path = tmp_path / "port.sock"
    config, reason = RX_BOUNCED[layout]
    async with attached_port(namespace, path, "--xdp", xdp) as port:
        await port.until_said("ready")
        with packet_socket(namespace) as packets:
            async with BuiltinGuest.connect(path, proving(config, len(SIZES))) as guest:
                await receive_all(guest, packets, frames_of(SIZES, seed=2))
        report = await port.stop()
    assert report.rx.bounced == {reason: len(SIZES)}
    assert report.rx.copied_bytes == report.rx.bytes == sum(SIZES)
    assert report.rx.direct == 0
    assert report.rx.dropped == {}


@pytest.mark.parametrize("layout", TX_DIRECT)
async def test_frame_of_every_size_leaves_from_the_guests_buffers_without_a_copy(
    layout: str, wire: tuple[Namespace, str], tmp_path: Path
) -> None:
    namespace, xdp = wire
    path = tmp_path / "port.sock"
    async with attached_port(namespace, path, "--xdp", xdp) as port:
        await port.until_said("ready")
        with packet_socket(namespace) as packets:
            async with BuiltinGuest.connect(path, proving(TX_DIRECT[layout], 0)) as guest:
                await send_all(guest, packets, frames_of(SIZES, seed=3))
        report = await port.stop()
    assert report.tx.direct == report.tx.frames == len(SIZES)
    assert report.tx.bytes == sum(SIZES)
    assert report.tx.copied_bytes == 0
    assert report.tx.bounced == {}


async def test_chain_of_more_pieces_than_a_packet_may_have_is_copied_and_arrives_whole(
    wire: tuple[Namespace, str], tmp_path: Path
) -> None:
    namespace, xdp = wire
    path = tmp_path / "port.sock"
    frames = frames_of(SIZES[-WINDOW:], seed=4)
    config = proving(GuestConfig(tx=BufferLayout(pieces=(12, *(50,) * 31), stride_bytes=61, offset_bytes=1)), 0)
    async with attached_port(namespace, path, "--xdp", xdp) as port:
        await port.until_said("ready")
        with packet_socket(namespace) as packets:
            async with BuiltinGuest.connect(path, config) as guest:
                await send_all(guest, packets, frames)
        report = await port.stop()
    assert report.tx.bounced == {"too_many_pieces": len(frames)}
    assert report.tx.copied_bytes == sum(map(len, frames))
