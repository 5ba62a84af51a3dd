"""Many frames both ways at once: none is lost, no buffer is lost, none is used twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from zero_copy_port import GUEST_KINDS, ZeroCopyPort

from mpassthru.testing.guest_config import Pattern, Source

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(400)]

SIZES = (60, 1514, 590, 1514, 128, 1514)
SENT_FRAMES_PER_S = 4000
"""What the guest sends beside: less than the emulated machine carries, so that nothing on the wire is lost."""

DIRECT_SHARE_MIN = 0.95


@pytest.mark.parametrize("count", [3_000, pytest.param(200_000, marks=pytest.mark.long)])
async def test_every_frame_arrives_and_every_buffer_comes_back(
    port: ZeroCopyPort, count: int, record_figure: Callable[[str, object], None]
) -> None:
    async with port.stay(replace(GUEST_KINDS["linux-hash-report"], canaries=False)) as stay:
        guest, start_s = stay.guest, time.monotonic()
        sending = Source(pattern=Pattern(seed=port.new_seed(), sizes=SIZES), count=count, first_sequence=0)
        arrived_there = port.peer.counters().check_good + count
        guest.start(rx="check", source=replace(sending, rate_frames_per_s=SENT_FRAMES_PER_S))
        await port.receive(guest, SIZES, count)
        there = await port.peer.wait_for(lambda c: c.check_good >= arrived_there, deadline_s=300)
        assert there.check_corrupt == there.check_missing == there.check_duplicate == there.kernel_drops == 0
        seconds = time.monotonic() - start_s
    assert (stay.tx.frames, stay.tx.direct, stay.tx.copied_bytes) == (count, count, 0)
    assert stay.rx.frames == count
    assert stay.rx.bounced.keys() <= port.may_bounce
    assert stay.rx.direct / count >= DIRECT_SHARE_MIN
    record_figure(f"{port.ifname}.frames_each_way", count)
    record_figure(f"{port.ifname}.rx_direct_share", stay.rx.direct / count)
    record_figure(f"{port.ifname}.frames_per_s_each_way", round(count / seconds))
