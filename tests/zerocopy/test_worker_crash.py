"""SIGKILL of the worker while a NIC writes to the guest's buffers: its successor waits for the NIC, then goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from zero_copy_port import HASH_REPORT, ZeroCopyPort, huge_guest

from mpassthru.testing.guest_config import BufferLayout, Pattern, Source
from mpassthru.vhost_user import Frontend

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

FRESH_FRAMES = 600
"""More than the rings hold."""
NO_END = 100_000_000
RATE_FRAMES_PER_S = 1000
TIMEOUT_S = 60
GUEST = huge_guest(features=HASH_REPORT, rx=BufferLayout(pieces=(1600,)))


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.long)])
async def test_no_head_is_lost_or_used_twice_when_the_worker_is_killed(
    port: ZeroCopyPort, kills: int, record_figure: Callable[[str, object], None]
) -> None:
    back_after_s: list[float] = []
    dead = -1
    async with port.stay(GUEST) as stay:
        guest = stay.guest
        guest.start(rx="check", source=Source(pattern=Pattern(seed=port.new_seed(), sizes=(60, 1514))))
        port.peer.start_sending(
            Pattern(seed=port.new_seed(), sizes=(1514, 60)), count=NO_END, rate_frames_per_s=RATE_FRAMES_PER_S
        )
        try:
            for _ in range(kills):
                report = await port.attached.until(
                    lambda r, dead=dead: r.mode == "zero-copy" and r.worker_pid != dead, timeout_s=TIMEOUT_S
                )
                assert report.worker_pid is not None
                dead, killed_s = report.worker_pid, time.monotonic()
                os.kill(dead, signal.SIGKILL)
                frontend = await Frontend.connect(port.socket_path, timeout_s=TIMEOUT_S)
                await guest.reconnect(frontend)
                received = guest.counters().rx_frames + FRESH_FRAMES
                sent = port.peer.counters().received + FRESH_FRAMES
                await guest.wait_for(lambda c, goal=received: c.rx_frames >= goal, deadline_s=TIMEOUT_S)
                await port.peer.wait_for(lambda c, goal=sent: c.received >= goal, deadline_s=TIMEOUT_S)
                back_after_s.append(round(time.monotonic() - killed_s, 2))
                assert guest.violations() == {}
        finally:
            port.peer.stop_sending()
    assert guest.counters().check_corrupt == port.peer.counters().check_corrupt == 0
    assert guest.driver.changed_gap_bytes() == 0
    record_figure(f"{port.ifname}.kills", kills)
    record_figure(f"{port.ifname}.back_after_s", back_after_s)
