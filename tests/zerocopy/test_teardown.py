"""A stopped virtqueue is the guest's again: from the moment of the answer on, nobody writes to its buffers.

A NIC goes on writing for some 40 ms after its socket was closed. So the answer comes later than that; here the buffers
are filled with a pattern as soon as it has come, and watched for longer than a NIC could still be at work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from zero_copy_port import HASH_REPORT, ZeroCopyPort, huge_guest

from mpassthru.testing.guest_config import BufferLayout, Pattern

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

FRAMES_BEFORE_STOP = 100
WATCH_S = 0.1
FLOOD_FRAMES = 100_000_000
FILLING = b"\xa5"
ROOM_BYTES = 1600
BUFFERS = 256
GUEST = huge_guest(features=HASH_REPORT, rx=BufferLayout(pieces=(ROOM_BYTES,), count=BUFFERS), canaries=False)


@pytest.mark.parametrize("stops", [3, pytest.param(200, marks=pytest.mark.long)])
async def test_stopped_queue_is_not_written_to_under_flood(
    port: ZeroCopyPort, stops: int, record_figure: Callable[[str, object], None]
) -> None:
    slowest_stop_s = 0.0
    async with port.stay(GUEST) as stay:
        guest = stay.guest
        ring = guest.ring(0)
        first = min(ring.descriptor(index)[0] for index in range(BUFFERS))
        length = BUFFERS * ROOM_BYTES
        filled = FILLING * length
        port.peer.start_sending(Pattern(seed=port.new_seed(), sizes=(1514,)), count=FLOOD_FRAMES)
        try:
            for _ in range(stops):
                guest.start(rx="sink")
                received = guest.counters().rx_frames
                await guest.wait_for(
                    lambda c, received=received: c.rx_frames > received + FRAMES_BEFORE_STOP, deadline_s=20
                )
                stop_s = time.monotonic()
                await guest.stop()
                slowest_stop_s = max(slowest_stop_s, time.monotonic() - stop_s)
                guest.driver.write(first, filled)
                watched_until = time.monotonic() + WATCH_S
                while time.monotonic() < watched_until:
                    assert guest.driver.read(first, length) == filled
                    await asyncio.sleep(0.01)
                await guest.start_device()
        finally:
            port.peer.stop_sending()
    assert port.attached.report is not None
    assert port.attached.report.troubles == ()
    assert stay.rx.frames > FRAMES_BEFORE_STOP * stops
    assert stay.rx.bounced.keys() <= port.may_bounce
    assert stay.rx.direct / stay.rx.frames > 1 / 2
    record_figure(f"{port.ifname}.direct_share_between_stops", stay.rx.direct / stay.rx.frames)
    record_figure(f"{port.ifname}.stops", stops)
    record_figure(f"{port.ifname}.slowest_stop_ms", round(1000 * slowest_stop_s))
