"""DPDK's virtio-user driver, untuned, as the guest: every frame is accounted for, whatever the load.

A frame that the generator sent towards the guest was lost on the veth pair (its ring was full), or met the XDP program;
from there on it is in the guest or in a counter of the port's report. A frame that testpmd sent is on the wire, or in a
counter. Nothing is allowed to be in neither.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mpassthru.broker.status import AttachReport
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.netns import Namespace, veth_namespace
from mpassthru.testing.testpmd import Testpmd, VirtioUser
from mpassthru.testing.wire import FrameGenerator, XdpSink

FRAME = b"\x02\0\0\0\0\1" + b"\x02\0\0\0\0\2" + b"\x88\xb5" + bytes(50)
RecordFigure = Callable[[str, object], None]
PER_FRAME_S = 200e-6
"""Slower than any machine that these tests are for."""
RATE_FRAMES_PER_S = 300_000
"""Generator, port and two threads of testpmd share what may be two cores; above this most frames are dropped."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(params=[True, False], ids=["mergeable", "not-mergeable"])
def mergeable(request: pytest.FixtureRequest) -> bool:
    value: bool = request.param
    return value


@pytest.fixture
def veth() -> Iterator[Namespace]:
    with veth_namespace() as namespace:
        yield namespace


@asynccontextmanager
async def guest_on_port(veth: Namespace, path: Path, *, mergeable: bool) -> AsyncIterator[tuple[AttachedPort, Testpmd]]:
    """A port on the veth pair and a testpmd on the port."""
    # The driver's default is mergeable: given only where a test wants it otherwise.
    guest = VirtioUser(path=path, mrg_rxbuf=None if mergeable else False)
    async with attached_port(veth, path, interval_s=0.2) as port:
        await port.until_said("ready")
        async with Testpmd([guest]) as testpmd:
            await port.until(lambda report: report.guest == "running")
            yield port, testpmd


def lost_on_the_veth_pair(veth: Namespace) -> int:
    """Frames that the generator sent and the port's end of the pair had no room for."""
    statistics = veth.run("ethtool", "-S", veth.peer)
    return sum(int(number) for number in re.findall(r"tx_queue_\d+_xdp_xmit_errors: (\d+)", statistics))


def met_the_program(report: AttachReport) -> int:
    return sum(report.steering["0"].values())


def delivered_or_dropped(report: AttachReport) -> int:
    return report.rx.frames + sum(report.rx.dropped.values())


async def send_until_delivered(generator: FrameGenerator, port: AttachedPort, frames: int) -> None:
    """Send at a rate that leaves the guest some CPU, until the guest was given as many frames."""
    async with generator.running(rate_frames_per_s=RATE_FRAMES_PER_S):
        await port.until(lambda report: report.rx.frames >= frames, timeout_s=frames * PER_FRAME_S)


async def settled(port: AttachedPort, *, met: int, sent: int, timeout_s: float) -> AttachReport:
    """The report once `met` frames met the program and were delivered or dropped, and `sent` frames left the guest."""
    return await port.until(
        lambda r: (
            met_the_program(r) == delivered_or_dropped(r) == met and r.tx.frames + sum(r.tx.dropped.values()) == sent
        ),
        timeout_s=timeout_s,
    )


async def test_rxonly_guest_gets_every_frame_that_is_not_in_a_drop_counter(
    veth: Namespace, tmp_path: Path, mergeable: bool, frames: int, record_figure: RecordFigure
) -> None:
    with veth.entered():
        generator = FrameGenerator(veth.peer_ifindex, FRAME)
    async with guest_on_port(veth, tmp_path / "s", mergeable=mergeable) as (port, testpmd):
        await testpmd.start("rxonly")
        await send_until_delivered(generator, port, frames)
        met = generator.sent - lost_on_the_veth_pair(veth)
        report = await settled(port, met=met, sent=0, timeout_s=frames * PER_FRAME_S)
        stats = await testpmd.wait_for(lambda s: s.rx_frames >= report.rx.frames)
        forwarded = await testpmd.stop()
    assert stats.rx_frames == forwarded.rx_frames == report.rx.frames
    assert stats.rx_bytes == report.rx.bytes == len(FRAME) * report.rx.frames
    assert report.rx.direct == report.rx.frames > 0
    assert report.rx.copied_bytes == 0
    record_figure("frames", {"sent": generator.sent, "guest": stats.rx_frames, "dropped": dict(report.rx.dropped)})


async def test_txonly_frames_all_reach_the_wire(
    veth: Namespace, tmp_path: Path, mergeable: bool, frames: int, record_figure: RecordFigure
) -> None:
    async with guest_on_port(veth, tmp_path / "s", mergeable=mergeable) as (port, testpmd):
        with veth.entered():
            sink = XdpSink(veth.peer_ifindex)
        with sink:
            await testpmd.start("txonly")
            await sink.wait_for(frames, deadline_s=frames * PER_FRAME_S)
            sent = (await testpmd.stop()).tx_frames
            report = await settled(port, met=0, sent=sent, timeout_s=10)
            assert await sink.wait_for(sent) == sent
            assert sink.bytes == report.tx.bytes
    assert report.tx.frames == report.tx.direct == sent >= frames
    assert report.tx.dropped == {}
    assert report.tx.copied_bytes == 0
    record_figure("frames", {"sent": sent, "wire": sent})


async def test_io_forwarding_returns_every_frame_that_is_not_in_a_drop_counter(
    veth: Namespace, tmp_path: Path, mergeable: bool, frames: int, record_figure: RecordFigure
) -> None:
    with veth.entered():
        generator = FrameGenerator(veth.peer_ifindex, FRAME)
    async with guest_on_port(veth, tmp_path / "s", mergeable=mergeable) as (port, testpmd):
        with veth.entered():
            sink = XdpSink(veth.peer_ifindex)
        with sink:
            await testpmd.start("io")
            await send_until_delivered(generator, port, frames)
            met = generator.sent - lost_on_the_veth_pair(veth)
            delivered = await port.until(
                lambda r: met_the_program(r) == delivered_or_dropped(r) == met, timeout_s=frames * PER_FRAME_S
            )
            await testpmd.wait_for(lambda s: s.rx_frames >= delivered.rx.frames)
            forwarded = await testpmd.stop()
            report = await settled(port, met=met, sent=forwarded.tx_frames, timeout_s=10)
            assert await sink.wait_for(report.tx.frames) == report.tx.frames
    assert forwarded.rx_frames == report.rx.frames
    assert forwarded.tx_frames + forwarded.tx_dropped == forwarded.rx_frames > 0
    assert report.tx.frames == report.tx.direct == forwarded.tx_frames
    assert report.rx.copied_bytes == report.tx.copied_bytes == 0
    figures = {"sent": generator.sent, "guest": report.rx.frames, "dropped": dict(report.rx.dropped)}
    record_figure("frames", {**figures, "returned": report.tx.frames})
