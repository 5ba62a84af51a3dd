"""The far end of the wire: what tests rely on to account for every frame, itself tested on a bare veth pair."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from mpassthru.errors import HostError, RefusedError
from mpassthru.testing import FrameGenerator, PacketWire, Pattern, XdpSink
from mpassthru.testing.netns import Namespace, veth_namespace

FRAME = bytes(12) + b"\x88\xb5" + bytes(46)


@pytest_asyncio.fixture
async def wires(veth: Namespace) -> AsyncIterator[tuple[PacketWire, PacketWire]]:
    async with PacketWire(veth.ifindex, capture_frames=1) as near, PacketWire(veth.peer_ifindex) as far:
        yield near, far


async def test_frames_of_every_size_cross_both_ways_unharmed(wires: tuple[PacketWire, PacketWire]) -> None:
    near, far = wires
    every_size = tuple(range(60, 1515))
    await asyncio.gather(
        near.send(Pattern(seed=1, sizes=every_size), count=3000),
        far.send(Pattern(seed=2, sizes=every_size), count=3000),
    )
    for wire in wires:
        counters = await wire.wait_for(lambda c: c.received >= 3000)
        assert counters.check_good == counters.sent == 3000
        assert counters.received_bytes == counters.sent_bytes == sum((every_size * 3)[:3000])
        assert counters.check_corrupt == counters.check_missing == counters.check_duplicate == 0
        assert counters.kernel_drops == counters.check_reordered == 0


async def test_every_fault_is_counted(wires: tuple[PacketWire, PacketWire]) -> None:
    near, far = wires
    far.start_sending(Pattern(), count=5)
    await near.wait_for(lambda c: c.received == 5)
    (frame,) = near.take_captured()
    far.send_frame(frame)
    far.send_frame(frame[:-1] + b"\x00")
    await far.send(Pattern(), count=2, first_sequence=8)
    far.send_frame(b"\x02" * 12 + b"\x08\x00" + bytes(46))
    counters = await near.wait_for(lambda c: c.received == 9)
    assert (counters.check_good, counters.check_duplicate, counters.check_corrupt) == (7, 1, 1)
    assert (counters.check_missing, counters.check_foreign) == (3, 0)
    near.reset_check()
    assert near.counters().check_good == 0


async def test_sequences_go_on_and_rates_are_kept(wires: tuple[PacketWire, PacketWire]) -> None:
    near, far = wires
    started_s = asyncio.get_running_loop().time()
    await far.send(Pattern(), count=100, rate_frames_per_s=2000)
    await far.send(Pattern(), count=100, rate_frames_per_s=2000)
    took_s = asyncio.get_running_loop().time() - started_s
    counters = await near.wait_for(lambda c: c.received == 200)
    assert counters.check_good == 200
    assert took_s >= 2 * 99 / 2000


async def test_portions_wait_for_their_arrival(wires: tuple[PacketWire, PacketWire]) -> None:
    near, far = wires
    await far.send_in_portions(Pattern(), count=1000, portion=300, arrived=lambda: near.counters().received)
    assert near.counters().check_good == 1000


async def test_one_wire_sends_one_thing_at_a_time(wires: tuple[PacketWire, PacketWire]) -> None:
    near, _ = wires
    near.start_sending(Pattern(), count=1_000_000, rate_frames_per_s=10)
    with pytest.raises(RefusedError, match="still running"):
        near.start_sending(Pattern(), count=1)
    near.stop_sending()
    with pytest.raises(RefusedError, match="22 to 16384 bytes"):
        near.start_sending(Pattern(sizes=(21,)), count=1)


async def test_other_ethertypes_are_received_if_wanted(veth: Namespace) -> None:
    async with (
        PacketWire(veth.ifindex) as near,
        PacketWire(veth.peer_ifindex, all_ethertypes=True, capture_frames=1) as far,
    ):
        rarp = b"\xff" * 6 + b"\x02" * 6 + b"\x80\x35" + bytes(46)
        near.send_frame(rarp)
        assert (await far.wait_for(lambda c: c.received == 1)).check_foreign == 1
        assert far.take_captured() == [rarp]


async def test_generator_and_sink_agree_to_the_frame(veth: Namespace) -> None:
    generator = FrameGenerator(veth.peer_ifindex, FRAME)
    with XdpSink(veth.ifindex) as sink:
        assert await generator.run(count=20_003, rate_frames_per_s=500_000) == 20_003
        await sink.wait_for(20_003)
        paced = await generator.run(duration_s=0.1, rate_frames_per_s=10_000)
        await sink.wait_for(20_003 + paced)
        assert 500 < paced <= 1001
        assert sink.frames == generator.sent
        assert sink.bytes == sink.frames * len(FRAME)


async def test_generator_stops_at_the_end_of_a_block(veth: Namespace) -> None:
    generator = FrameGenerator(veth.peer_ifindex, FRAME)
    with XdpSink(veth.ifindex) as sink:
        async with generator.running():
            await sink.wait_for(1)
        sent = generator.sent
        assert sent > 0
        await generator.run(count=1)
        assert generator.sent == sent + 1


async def test_generator_needs_its_interface(veth: Namespace) -> None:
    generator = FrameGenerator(veth.peer_ifindex + 100, FRAME)
    with pytest.raises(HostError, match="ENODEV") as refused:
        await generator.run(count=1)
    assert refused.value.errno == errno.ENODEV


async def test_sink_counts_generic_xdp_too(veth: Namespace) -> None:
    with XdpSink(veth.ifindex, xdp_mode="generic") as sink:
        async with PacketWire(veth.peer_ifindex) as wire:
            await wire.send(Pattern(sizes=(60, 100)), count=10)
            await sink.wait_for(10)
        assert (sink.frames, sink.bytes) == (10, 5 * 160)


async def test_second_sink_is_refused_and_the_first_leaves_nothing(veth: Namespace) -> None:
    with XdpSink(veth.ifindex), pytest.raises(HostError, match="EBUSY"):
        XdpSink(veth.ifindex)
    XdpSink(veth.ifindex).close()


async def test_wire_stays_in_the_namespace_it_was_made_in() -> None:
    with veth_namespace() as namespace:
        with namespace.entered():
            generator = FrameGenerator(namespace.peer_ifindex, FRAME)
            wire = PacketWire(namespace.peer_ifindex)
            sink = XdpSink(namespace.ifindex)
        async with wire:
            with sink:
                await generator.run(count=10)
                await wire.send(Pattern(), count=10)
                await sink.wait_for(20)
