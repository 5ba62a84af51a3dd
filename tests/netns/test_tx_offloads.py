"""What a guest leaves to the port: checksums and segmentation, compared byte for byte with what the kernel makes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mpassthru.testing.attached_port import attached_port
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import DEFAULT_FEATURES, BufferLayout, GuestConfig, Source
from mpassthru.testing.net_header import GSO_TCPV4
from mpassthru.testing.netns import Namespace, veth_namespace
from mpassthru.testing.wire import XdpSink
from mpassthru.vhost_user.features import VirtioFeature
from mpassthru.worker.device import TX_OFFLOADS
from tests.netns.offload_packets import (
    KernelSegmentation,
    Request,
    capturing,
    kernel_segmentation,
    random_request,
    verify,
)

FEATURES = DEFAULT_FEATURES | VirtioFeature(TX_OFFLOADS)
REQUESTS = 2100
WINDOW = 8
"""Requests on their way at once: what they become fits every buffer on the way, so that nothing is lost."""
HEADER_BYTES = 14 + 20 + 32
"""Ethernet, IPv4, TCP with timestamps."""

LAYOUTS = {
    # The headers, and page fragments of up to 32 KiB.
    "linux-like": BufferLayout(count=WINDOW, pieces=(12, 200, 32768, 32768), indirect=True),
    "one-piece": BufferLayout(count=WINDOW, pieces=(66000,)),
    "odd": BufferLayout(count=WINDOW, pieces=(7, 5, 33, *(5003,) * 13), stride_bytes=5005, offset_bytes=1),
}


@pytest.fixture(scope="module")
def wire() -> Iterator[Namespace]:
    with veth_namespace() as namespace:
        yield namespace


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelSegmentation]:
    with veth_namespace() as namespace, kernel_segmentation(namespace) as segmentation:
        yield segmentation


def source_of(requests: list[Request]) -> Source:
    return Source(
        frames=tuple(request.frame for request in requests),
        headers=tuple(request.header.pack() for request in requests),
        count=len(requests),
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_segments_of_random_packets_are_the_kernels_byte_for_byte(
    layout: str,
    wire: Namespace,
    kernel: KernelSegmentation,
    tmp_path: Path,
    *,
    seed: int,
    record_figure: Callable[[str, object], None],
) -> None:
    source = random.Random(seed)
    requests = [random_request(source) for _ in range(REQUESTS // len(LAYOUTS))]
    config = GuestConfig(features=FEATURES, queue_size=256, tx=LAYOUTS[layout], canaries=True)
    segments = 0
    async with attached_port(wire, tmp_path / "port.sock") as port:
        await port.until_said("ready")
        with capturing(wire) as capture:
            async with BuiltinGuest.connect(tmp_path / "port.sock", config) as guest:
                for start in range(0, len(requests), WINDOW):
                    window = requests[start : start + WINDOW]
                    guest.start(source=source_of(window))
                    for request in window:
                        sent = await capture.receive(request.frames)
                        assert sent == await kernel.segments(request)
                        verify(sent[0])
                        verify(sent[-1])
                        segments += len(sent)
                await guest.wait_for(lambda c: c.tx_frames == len(requests))
                await guest.stop()
                assert guest.violations() == {}
                assert guest.check_canaries() == 0
        report = await port.stop()
    assert report.tx.frames == segments
    assert sum(report.tx.offloaded.values()) == len(requests)
    assert report.tx.dropped == {}
    assert set(report.tx.bounced) <= {"too_many_pieces", "address_alias"}
    assert report.tx.direct == report.tx.header_split >= 0.9 * segments
    record_figure("offloaded", {"requests": len(requests), "frames": segments, **report.tx.offloaded})


def large_tcp(payload_bytes: int, size: int) -> Request:
    """A frame of TCP over IPv4 with timestamps, as Linux sends them, to be cut into segments of `size`."""
    source = random.Random(1)
    made = (random_request(source) for _ in itertools.count())
    like = next(it for it in made if it.header.gso_type == GSO_TCPV4 and it.header.header_bytes == HEADER_BYTES)
    frame = like.frame[:HEADER_BYTES] + source.randbytes(payload_bytes)
    return Request(frame, replace(like.header, gso_size=size), -(-payload_bytes // size))


async def test_of_64_kib_of_tcp_no_payload_is_copied(
    wire: Namespace, tmp_path: Path, record_figure: Callable[[str, object], None]
) -> None:
    request = large_tcp(65_160, 1448)
    config = GuestConfig(features=FEATURES, queue_size=256, tx=LAYOUTS["linux-like"], canaries=True)
    async with attached_port(wire, tmp_path / "port.sock") as port:
        await port.until_said("ready")
        with capturing(wire) as capture:
            async with BuiltinGuest.connect(tmp_path / "port.sock", config) as guest:
                guest.start(source=source_of([request]))
                sent = await capture.receive(45)
                await guest.wait_for(lambda c: c.tx_frames == 1)
                await guest.stop()
                assert guest.check_canaries() == 0
        report = await port.stop()
    assert b"".join(frame[HEADER_BYTES:] for frame in sent) == request.frame[HEADER_BYTES:]
    assert report.tx.frames == report.tx.direct == report.tx.header_split == 45
    assert report.tx.copied_bytes == report.tx.header_bytes == 45 * HEADER_BYTES
    assert report.tx.offloaded == {"tso4": 1}
    record_figure(
        "bytes", {"sent": report.tx.bytes, "copied": report.tx.copied_bytes, "headers": report.tx.header_bytes}
    )


@pytest.mark.slow
async def test_large_frames_are_sent_whole_whenever_the_queue_stops(wire: Namespace, tmp_path: Path) -> None:
    # In pieces of 7 bytes one does not fit the rings: there is always a frame of which only a part was sent.
    source = replace(source_of([large_tcp(30_000, 7)]), count=None)
    config = GuestConfig(features=FEATURES, queue_size=256, tx=LAYOUTS["linux-like"], canaries=True)
    async with attached_port(wire, tmp_path / "port.sock") as port:
        await port.until_said("ready")
        with wire.entered():
            sink = XdpSink(wire.peer_ifindex)
        with sink:
            async with BuiltinGuest.connect(tmp_path / "port.sock", config) as guest:
                for _ in range(12):
                    guest.start(source=source)
                    await sink.wait_for(sink.frames + 1)
                    await guest.stop()
                    await guest.start_device()
                await guest.stop()
                assert guest.violations() == {}
                assert guest.check_canaries() == 0
                used = guest.counters().tx_frames
            report = await port.stop()
            assert await sink.wait_for(report.tx.frames) == report.tx.frames
    assert report.tx.offloaded == {"tso4": used}
    assert report.tx.dropped == {}
    assert used > 0


@pytest.mark.parametrize("choice", ["auto", "on", "off"])
async def test_offloads_are_offered_unless_switched_off(choice: str, wire: Namespace, tmp_path: Path) -> None:
    async with attached_port(wire, tmp_path / "port.sock", "--tx-offloads", choice) as port:
        await port.until_said("ready")
        async with BuiltinGuest.connect(tmp_path / "port.sock", GuestConfig(features=FEATURES)) as guest:
            offered = guest.frontend.features & TX_OFFLOADS
    assert offered == (0 if choice == "off" else TX_OFFLOADS)
