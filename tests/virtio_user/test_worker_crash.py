"""SIGKILL of the worker, several times, while virtio-user as the server sends every frame back: it goes on each time.

virtio-user starts a new back-end at base 0, whatever its rings' indices are; it keeps no record of what is in flight.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpassthru.testing.attached_port import attached_port
from mpassthru.testing.guest_config import Pattern
from mpassthru.testing.netns import veth_namespace
from mpassthru.testing.testpmd import Testpmd, VirtioUser
from mpassthru.testing.wire import PacketWire

KILLS = 5
RATE_FRAMES_PER_S = 50_000
FRESH_FRAMES = 2000
"""More than the rings hold."""
NO_END = 1 << 31
TIMEOUT_S = 20.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


async def test_virtio_user_as_server_outlives_workers(
    tmp_path: Path, record_figure: Callable[[str, object], None]
) -> None:
    path = tmp_path / "s"
    back_after_s: list[float] = []
    with veth_namespace() as namespace:
        with namespace.entered():
            wire = PacketWire(namespace.peer_ifindex)
        async with attached_port(namespace, path, connect=True) as port, wire:
            await port.until_said("is ready")
            async with Testpmd([VirtioUser(path=path, server=True)]) as testpmd:
                await testpmd.start("macswap")
                await port.until(lambda report: report.guest == "running")
                wire.start_sending(Pattern(sizes=(60, 1514)), count=NO_END, rate_frames_per_s=RATE_FRAMES_PER_S)
                await wire.wait_for(lambda counters: counters.received >= FRESH_FRAMES, deadline_s=TIMEOUT_S)
                dead = -1
                for _ in range(KILLS):
                    running = await port.until(lambda r, dead=dead: r.guest == "running" and r.worker_pid != dead)
                    pid = running.worker_pid
                    assert pid is not None
                    os.kill(pid, signal.SIGKILL)
                    killed_s, dead = time.monotonic(), pid
                    await port.until(lambda r, dead=dead: r.worker_pid not in (None, dead), timeout_s=TIMEOUT_S)
                    enough = wire.counters().received + FRESH_FRAMES
                    await wire.wait_for(lambda c, enough=enough: c.received >= enough, deadline_s=TIMEOUT_S)
                    back_after_s.append(round(time.monotonic() - killed_s, 3))
                wire.stop_sending()
                await testpmd.stop()
            counters = wire.counters()
            report = await port.stop()
    assert counters.check_corrupt == 0
    assert report.worker_restarts == KILLS
    assert report.faults == 0
    assert report.buffers_resumed > 0
    record_figure("kills", KILLS)
    record_figure("back_after_s", back_after_s)
    record_figure("buffers_resumed", report.buffers_resumed)
    record_figure("frames_returned", counters.check_good)
    record_figure("frames_returned_twice", counters.check_duplicate)
