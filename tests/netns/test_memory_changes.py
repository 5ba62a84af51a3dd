"""Memory that comes and goes while a port runs: new memory works at once, memory given back is never touched again."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from mpassthru.broker.status import AttachReport
from mpassthru.errors import HostError
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import (
    DEFAULT_PROTOCOL_FEATURES,
    BufferLayout,
    GuestConfig,
    Pattern,
    Region,
    Source,
)
from mpassthru.testing.netns import Namespace
from mpassthru.testing.wire import PacketWire
from mpassthru.vhost_user import Frontend
from mpassthru.vhost_user.features import ProtocolFeature

RX, TX = 0, 1
RINGS, BUFFERS = 0, 1
"""Regions of memory: the rings never move, the buffers come and go."""
ROOM_BYTES = 1600
RX_BUFFERS = 256
FLOOD_FRAMES = 1_000_000_000
FLOOD = Pattern(seed=7, sizes=(1514,))
WATCH_S = 0.05
FRAMES_WHILE_WATCHED = 200
FRAMES_BEFORE = 100
FILLING = b"\xa5"

GUEST = GuestConfig(
    regions=(Region(size_bytes=4 << 20), Region(guest_phys_address=0x1_0000_0000, size_bytes=8 << 20)),
    protocol_features=DEFAULT_PROTOCOL_FEATURES | ProtocolFeature.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    rx=BufferLayout(pieces=(ROOM_BYTES,), count=RX_BUFFERS, region=BUFFERS),
    tx=BufferLayout(region=BUFFERS),
)


@pytest.fixture
async def port(veth: Namespace, tmp_path: Path) -> AsyncIterator[AttachedPort]:
    async with attached_port(veth, tmp_path / "port.sock") as attached:
        await attached.until_said("is ready")
        yield attached


@pytest.fixture
async def wire(veth: Namespace) -> AsyncIterator[PacketWire]:
    async with PacketWire(veth.peer_ifindex) as peer:
        yield peer


# ---- memory that is added ----------------------------------------------------------------------------------


def lost_without_socket(report: AttachReport | None) -> int:
    assert report is not None
    return sum(queue["dropped_no_guest"] for queue in report.steering.values())


@pytest.mark.parametrize("message", ["ADD_MEM_REG", "SET_MEM_TABLE"])
async def test_added_memory_is_used_at_once_and_in_place_after_a_moment(
    message: str,
    port: AttachedPort,
    wire: PacketWire,
    record_figure: Callable[[str, object], None],
) -> None:
    """rx buffers are in the first region and get a flood; tx buffers are in the one that is added."""
    rate = 20_000
    config = replace(GUEST, rx=replace(GUEST.rx, region=RINGS), canaries=False)
    async with BuiltinGuest.connect(port.socket_path, config, start_device=False) as guest:
        await guest.start_device(regions=[RINGS])
        guest.start(rx="check")
        wire.start_sending(FLOOD, count=FLOOD_FRAMES, rate_frames_per_s=rate)
        await guest.wait_for(lambda c: c.rx_frames > FRAMES_BEFORE)
        before = await port.until(lambda r: r.rx.frames > FRAMES_BEFORE)

        added_s = time.monotonic()
        if message == "ADD_MEM_REG":
            await guest.frontend.add_mem_reg(guest.memory[BUFFERS])
        else:
            await guest.set_memory([BUFFERS, RINGS])
        answered_ms = 1000 * (time.monotonic() - added_s)
        source = Source(pattern=Pattern(seed=9, sizes=(60, 1514)), rate_frames_per_s=2000)
        guest.start(rx="check", source=source)
        await wire.wait_for(lambda c: c.check_good > 0)
        bounced = await port.until(lambda r: r.tx.bounced.get("unregistered", 0) > 0)
        direct = await port.until(lambda r: r.tx.direct > 0)
        in_place_ms = 1000 * (time.monotonic() - added_s)

        guest.start(rx="check")
        wire.stop_sending()
        await guest.wait_for(lambda c: c.tx_frames == c.tx_posted)
        await guest.stop()
        counters = guest.counters()
        assert guest.violations() == {}
        assert counters.check_corrupt == counters.check_duplicate == 0
        assert wire.counters().check_corrupt == wire.counters().check_duplicate == 0
        # The rx ring was never stopped, and the exchange of its socket is all that was lost.
        lost = lost_without_socket(await port.until(lambda r: r.mode == "detached")) - lost_without_socket(before)
    assert bounced.rx.bounced == {}
    assert set(direct.tx.bounced) == {"unregistered"}
    record_figure(f"{message}.answered_ms", round(answered_ms, 1))
    record_figure(f"{message}.in_place_after_ms", round(in_place_ms))
    record_figure(f"{message}.exchange_ms", round(1000 * lost / rate))
    assert lost < rate / 2


async def test_rx_buffers_in_added_memory_are_copied_to_and_then_received_into(
    port: AttachedPort, wire: PacketWire
) -> None:
    config = replace(GUEST, tx=replace(GUEST.tx, region=RINGS))
    async with BuiltinGuest.connect(port.socket_path, config, start_device=False) as guest:
        await guest.start_device(regions=[RINGS], vrings=[TX])
        # What is on its way keeps the port from being idle, so that the socket of before is still there.
        guest.start(rx="check", source=Source(pattern=Pattern(sizes=(60,)), rate_frames_per_s=20_000))
        await guest.wait_for(lambda c: c.tx_frames > FRAMES_BEFORE)
        await guest.frontend.add_mem_reg(guest.memory[BUFFERS])
        await guest.start_vring(RX)
        await guest.frontend.set_vring_enable(RX, True)
        guest.ring(RX).kick()

        wire.start_sending(FLOOD, count=FLOOD_FRAMES, rate_frames_per_s=20_000)
        await port.until(lambda r: r.rx.bounced.get("unregistered", 0) > 0)
        await port.until(lambda r: r.rx.direct > FRAMES_BEFORE)
        wire.stop_sending()
        guest.start(rx="check")
        await guest.stop()

        counters = guest.counters()
        assert guest.violations() == {}
        assert counters.check_corrupt == counters.check_duplicate == 0


# ---- memory that is given back -----------------------------------------------------------------------------


class Buffers:
    """The memory of a guest's rx buffers: filled with a pattern, and watched while the wire floods the port."""

    def __init__(self, guest: BuiltinGuest, wire: PacketWire) -> None:
        self._guest, self._wire = guest, wire
        ring = guest.ring(RX)
        self._first = min(ring.descriptor(index)[0] for index in range(RX_BUFFERS))
        self._filled = FILLING * (RX_BUFFERS * ROOM_BYTES)

    async def assert_untouched(self) -> None:
        """Fill them now, and see that nobody writes to them while many more frames arrive."""
        self._guest.driver.write(self._first, self._filled)
        sent, watched_until = self._wire.counters().sent, time.monotonic() + WATCH_S
        while time.monotonic() < watched_until or self._wire.counters().sent < sent + FRAMES_WHILE_WATCHED:
            assert self._guest.driver.read(self._first, len(self._filled)) == self._filled
            await asyncio.sleep(0.005)


async def stop_rings(guest: BuiltinGuest) -> None:
    await guest.stop()


async def remove_region(guest: BuiltinGuest) -> None:
    await guest.frontend.rem_mem_reg(guest.memory[BUFFERS])


async def send_table_without_it(guest: BuiltinGuest) -> None:
    await guest.set_memory([RINGS])


GIVEN_BACK_BY = {"GET_VRING_BASE": stop_rings, "REM_MEM_REG": remove_region, "SET_MEM_TABLE": send_table_without_it}


@pytest.mark.parametrize("rounds", [5, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("message", GIVEN_BACK_BY)
async def test_memory_given_back_is_not_written_to_under_flood(
    message: str,
    rounds: int,
    port: AttachedPort,
    wire: PacketWire,
    record_figure: Callable[[str, object], None],
) -> None:
    """Buffers are still posted when their memory goes: the answer is a promise whatever the driver does."""
    slowest_s = 0.0
    async with BuiltinGuest.connect(port.socket_path, GUEST) as guest:
        buffers = Buffers(guest, wire)
        wire.start_sending(FLOOD, count=FLOOD_FRAMES)
        for _ in range(rounds):
            guest.start(rx="sink")
            received = guest.counters().rx_frames
            await guest.wait_for(lambda c, received=received: c.rx_frames > received + FRAMES_BEFORE)
            asked_s = time.monotonic()
            await GIVEN_BACK_BY[message](guest)
            slowest_s = max(slowest_s, time.monotonic() - asked_s)
            guest.pause()
            await buffers.assert_untouched()
            if message != "GET_VRING_BASE":
                await guest.stop()
            await guest.start_device()
        wire.stop_sending()
        await guest.stop()
        assert guest.violations() == {}
        await port.until(lambda r: r.rx.direct > FRAMES_BEFORE * rounds)
    record_figure(f"{message}.rounds", rounds)
    record_figure(f"{message}.slowest_answer_ms", round(1000 * slowest_s))


@pytest.mark.parametrize("rounds", [3, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
async def test_memory_of_a_front_end_that_is_let_go_is_not_written_to_under_flood(
    rounds: int, port: AttachedPort, wire: PacketWire
) -> None:
    """The end of the connection is said by the port's own end of the socket, once everything is given back."""
    loop = asyncio.get_running_loop()
    wire.start_sending(FLOOD, count=FLOOD_FRAMES)
    for _ in range(rounds):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        await loop.sock_connect(sock, str(port.socket_path))
        with sock.dup() as ours:
            async with BuiltinGuest.over(Frontend.from_socket(sock), GUEST) as guest:
                buffers = Buffers(guest, wire)
                guest.start(rx="sink")
                await guest.wait_for(lambda c: c.rx_frames > FRAMES_BEFORE)
                ours.shutdown(socket.SHUT_WR)
                assert await asyncio.wait_for(loop.sock_recv(ours, 1), 5) == b""
                guest.pause()
                await buffers.assert_untouched()
    wire.stop_sending()
    await port.until(lambda r: r.guest == "waiting" and r.rx.direct > FRAMES_BEFORE * rounds)


# ---- what it costs -----------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("backing", ["memfd", "huge-memfd"])
@pytest.mark.parametrize("size_mib", [256, 1024, 4096])
async def test_adding_to_large_memory_costs_traffic_no_more_than_an_exchange(
    size_mib: int,
    backing: Literal["memfd", "huge-memfd"],
    port: AttachedPort,
    wire: PacketWire,
    record_figure: Callable[[str, object], None],
) -> None:
    """Removing, which maps everything anew, is the measure of what adding cost if it were done in the same way."""
    rate = 20_000
    large = Region(size_bytes=size_mib << 20, backing=backing)
    small = replace(GUEST.regions[BUFFERS], backing=backing, guest_phys_address=1 << 36)
    rx, tx = replace(GUEST.rx, region=RINGS), replace(GUEST.tx, region=RINGS)
    config = replace(GUEST, regions=(large, small), rx=rx, tx=tx)
    try:
        connecting = BuiltinGuest.connect(port.socket_path, config, start_device=False, timeout_s=30)
        guest = await connecting.__aenter__()
    except HostError as error:
        pytest.skip(f"{error}: sysctl vm.nr_hugepages={size_mib // 2 + 16}")
    try:
        await guest.start_device(regions=[RINGS])
        guest.start(rx="check")
        wire.start_sending(FLOOD, count=FLOOD_FRAMES, rate_frames_per_s=rate)
        for change in ("add", "remove"):
            await port.until(lambda r: r.guest == "running")
            received = guest.counters().rx_frames
            await guest.wait_for(lambda c, received=received: c.rx_frames > received + FRAMES_BEFORE)
            before, missing = lost_without_socket(port.report), guest.counters().check_missing
            changed_s = time.monotonic()
            if change == "add":
                await guest.frontend.add_mem_reg(guest.memory[BUFFERS])
            else:
                await guest.frontend.rem_mem_reg(guest.memory[BUFFERS])
            answered_ms = 1000 * (time.monotonic() - changed_s)
            # Longer than the port waits for a quiet moment, so that the exchange is in it too.
            received = guest.counters().rx_frames
            await guest.wait_for(lambda c, received=received: c.rx_frames > received + 4 * rate, deadline_s=30)
            await port.news()
            await port.news()
            exchange_ms = 1000 * (lost_without_socket(port.report) - before) / rate
            standstill_ms = 1000 * (guest.counters().check_missing - missing) / rate
            record_figure(f"{backing}.{size_mib}_mib.{change}.without_socket_ms", round(exchange_ms))
            record_figure(f"{backing}.{size_mib}_mib.{change}.answered_ms", round(answered_ms, 1))
            record_figure(f"{backing}.{size_mib}_mib.{change}.standstill_ms", round(standstill_ms))
        wire.stop_sending()
        await guest.stop()
        assert guest.violations() == {}
        assert guest.counters().check_corrupt == 0
    finally:
        await connecting.__aexit__(None, None, None)
