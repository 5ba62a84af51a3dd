"""Frames that a guest takes merged: the kernel's segmentation cuts them again into what came, byte for byte."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpassthru.testing.attached_port import attached_port
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import DEFAULT_FEATURES, BufferLayout, GuestConfig
from mpassthru.testing.net_header import NEEDS_CSUM, NetHeader
from mpassthru.testing.netns import Namespace, veth_namespace
from mpassthru.testing.xsk import stopped
from mpassthru.vhost_user.features import VirtioFeature
from mpassthru.worker.device import RX_OFFLOADS
from tests.netns.frames_in_place import packet_socket
from tests.netns.offload_packets import (
    KernelSegmentation,
    Request,
    kernel_segmentation,
    random_request,
    stream_request,
)

FEATURES = DEFAULT_FEATURES | VirtioFeature(RX_OFFLOADS)
PACKETS = 60
"""To the guest, in each of the layouts."""
SEGMENT = 1448
BURST = 64
"""Of the port's loop: what comes in one is merged."""

LAYOUTS = {
    "linux": BufferLayout(pieces=(1536,)),
    "pages": BufferLayout(pieces=(4096,), count=128),
    "odd": BufferLayout(pieces=(1601,), stride_bytes=1603, offset_bytes=3),
    "small": BufferLayout(pieces=(256,)),
}


@pytest.fixture(scope="module")
def wire() -> Iterator[Namespace]:
    with veth_namespace() as namespace:
        yield namespace


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelSegmentation]:
    with veth_namespace() as namespace, kernel_segmentation(namespace) as segmentation:
        yield segmentation


def large_request(source: random.Random, burst: int) -> Request:
    """A packet that is to be cut into a burst at most."""
    while True:
        request = random_request(source)
        if request.header.gso_size and request.frames <= burst:
            return request


def stream_of(source: random.Random, burst: int) -> Request:
    """A part of a TCP stream that is to be cut into a burst at most, and no more than an IP packet holds."""
    return stream_request(source.randint(2 * SEGMENT + 1, min(burst, 45) * SEGMENT), SEGMENT)


def frames_in(header: NetHeader, frame: bytes) -> int:
    """Number of segments that a packet is to be cut into."""
    return -(-(len(frame) - header.header_bytes) // header.gso_size) if header.gso_type else 1


async def captured(guest: BuiltinGuest, frames: int) -> list[tuple[NetHeader, bytes]]:
    """What the guest got, as soon as it has so many frames of the wire, merged or not."""
    packets: list[tuple[NetHeader, bytes]] = []
    async with asyncio.timeout(10):
        while sum(frames_in(*packet) for packet in packets) < frames:
            await asyncio.sleep(0.005)
            packets += guest.take_captured_packets()
    return packets


async def cut(kernel: KernelSegmentation, header: NetHeader, frame: bytes) -> list[bytes]:
    """What the kernel makes of a packet that the guest got."""
    if not header.gso_type:
        assert header.flags == 0
        return [frame]
    assert header.flags == NEEDS_CSUM
    return await kernel.segments(Request(frame, header, frames_in(header, frame)))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_what_is_merged_of_the_kernels_segments_is_cut_into_the_same_by_the_kernel(
    layout: str,
    packed: bool,
    wire: Namespace,
    kernel: KernelSegmentation,
    tmp_path: Path,
    *,
    seed: int,
    record_figure: Callable[[str, object], None],
) -> None:
    source = random.Random(seed)
    rings = VirtioFeature.VIRTIO_F_RING_PACKED if packed else 0
    config = GuestConfig(
        features=FEATURES | rings,
        queue_size=512,
        rx=LAYOUTS[layout],
        canaries=True,
        capture_frames=PACKETS * BURST,
    )
    # As many as fit the guest's buffers.
    burst = BURST if layout != "small" else 32
    frames = merged = 0
    async with attached_port(wire, tmp_path / "s", "--rx-offloads", "on") as port:
        await port.until_said("ready")
        with packet_socket(wire) as peer:
            async with BuiltinGuest.connect(tmp_path / "s", config) as guest:
                report = await port.until(lambda report: report.guest == "running")
                assert report.worker_pid is not None
                guest.start(rx="sink")
                for number in range(PACKETS):
                    # Of the others, few are such that any of their segments may be merged.
                    is_stream = number % 2 == 0
                    request = stream_of(source, burst) if is_stream else large_request(source, burst)
                    sent = await kernel.segments(request)
                    async with stopped(report.worker_pid):
                        for frame in sent:
                            peer.send(frame)
                    frames += len(sent)
                    packets = await captured(guest, len(sent))
                    assert [part for packet in packets for part in await cut(kernel, *packet)] == sent
                    large = sum(1 for header, _ in packets if header.gso_type)
                    assert large > 0 or not is_stream
                    merged += large
                await guest.stop()
                assert guest.violations() == {}
                assert guest.check_canaries(tails=False) == 0
        report = await port.stop()
    assert (report.rx.frames, report.rx.dropped) == (frames, {})
    assert report.rx.offloaded == {"gro": merged}
    record_figure("merged", {"frames": frames, "large packets": merged, "bounced": report.rx.bounced})


async def test_payload_of_a_stream_is_moved_once_and_a_broken_segment_comes_as_it_is(
    wire: Namespace, kernel: KernelSegmentation, tmp_path: Path
) -> None:
    config = GuestConfig(features=FEATURES, rx=LAYOUTS["linux"], canaries=True, capture_frames=BURST)
    sent = await kernel.segments(stream_request(40 * SEGMENT, SEGMENT))
    broken = bytearray(sent[20])
    broken[-1] ^= 1
    sent[20] = bytes(broken)
    async with attached_port(wire, tmp_path / "s", "--rx-offloads", "on") as port:
        await port.until_said("ready")
        with packet_socket(wire) as peer:
            async with BuiltinGuest.connect(tmp_path / "s", config) as guest:
                report = await port.until(lambda report: report.guest == "running")
                assert report.worker_pid is not None
                guest.start(rx="sink")
                async with stopped(report.worker_pid):
                    for frame in sent:
                        peer.send(frame)
                packets = await captured(guest, len(sent))
                await guest.stop()
                assert guest.violations() == {}
        report = await port.stop()
    assert [header.gso_size for header, _ in packets] == [SEGMENT, 0, SEGMENT]
    assert packets[1] == (NetHeader(), sent[20])
    assert [part for packet in packets for part in await cut(kernel, *packet)] == sent
    assert report.rx.offloaded == {"gro": 2}
    assert (report.rx.bounced, report.rx.direct) == ({"merged": 39}, 1)
    assert report.rx.copied_bytes == (39 - 2) * SEGMENT


@pytest.mark.parametrize("choice", ["auto", "on", "off"])
async def test_merging_is_offered_where_it_was_asked_for(choice: str, wire: Namespace, tmp_path: Path) -> None:
    async with attached_port(wire, tmp_path / "s", "--rx-offloads", choice) as port:
        await port.until_said("ready")
        async with BuiltinGuest.connect(tmp_path / "s", GuestConfig(features=FEATURES)) as guest:
            offered = guest.frontend.features & RX_OFFLOADS
    assert offered == (RX_OFFLOADS if choice == "on" else 0)
