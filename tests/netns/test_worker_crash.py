"""SIGKILL of the worker under full load both ways: the guest goes on, and its account of every buffer stays right."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mpassthru.broker.port import RESTART_AT_ONCE_S
from mpassthru.broker.status import AttachReport
from mpassthru.testing.attached_port import AttachedPort, attached_port
from mpassthru.testing.child import until_gone
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import (
    DEFAULT_FEATURES,
    DEFAULT_PROTOCOL_FEATURES,
    BufferLayout,
    GuestConfig,
    Pattern,
    Source,
)
from mpassthru.testing.netns import Namespace
from mpassthru.testing.wire import PacketWire
from mpassthru.vhost_user import Frontend, ProtocolFeature, VirtioFeature

RecordFigure = Callable[[str, object], None]

BACK_WITHIN_S = 1.0
TIMEOUT_S = 15.0
QUEUE_SIZE = 256
FRESH_FRAMES = 2 * QUEUE_SIZE
"""More than the rings hold: who received so many has received from the new worker."""
PIECE_BYTES, PIECES = 80, 19
FROM_GUEST = Pattern(seed=1, sizes=(8 * PIECE_BYTES, 1514))
"""Every second frame is in too many pieces: it is copied, and its head is used at once. Others wait for the kernel."""
TO_GUEST = Pattern(seed=2, sizes=(60, 1514, 600, 61))
ENDLESS = 1 << 31

WHO_KEEPS_THE_RECORD = {
    "front-end": ProtocolFeature.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    # As QEMU: it starts a new back-end at the used index.
    "broker": ProtocolFeature(0),
}
RINGS = {"split": VirtioFeature(0), "packed": VirtioFeature.VIRTIO_F_RING_PACKED}


@dataclass
class Crashes:
    """What a guest went through."""

    back_after_s: list[float] = field(default_factory=list)
    last_worker: int | None = None

    def is_over(self, report: AttachReport) -> bool:
        """Whether the next worker has frames steered to it."""
        return report.worker == "ready" and report.mode == "copy" and report.worker_pid != self.last_worker


def config(keeper: str, rings: str) -> GuestConfig:
    """A guest of which every byte is watched."""
    return GuestConfig(
        queue_size=QUEUE_SIZE,
        features=DEFAULT_FEATURES | RINGS[rings],
        protocol_features=DEFAULT_PROTOCOL_FEATURES | WHO_KEEPS_THE_RECORD[keeper],
        rx=BufferLayout(pieces=(1536,)),
        tx=BufferLayout(count=200, pieces=(12, *(PIECE_BYTES,) * PIECES), stride_bytes=81, indirect=True),
        canaries=True,
    )


async def crash(port: AttachedPort, path: Path, guest: BuiltinGuest, wire: PacketWire, crashes: Crashes) -> None:
    """Kill the worker in the middle of everything, connect again as a front-end does, and wait for frames both ways."""
    pid = (await port.until(crashes.is_over, timeout_s=TIMEOUT_S)).worker_pid
    assert pid is not None
    crashes.last_worker = pid
    killed_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    await until_gone(pid)
    received, sent = guest.counters().rx_frames, wire.counters().received
    await guest.reconnect(await Frontend.connect(path, timeout_s=TIMEOUT_S))
    await guest.wait_for(lambda counters: counters.rx_frames >= received + FRESH_FRAMES, deadline_s=TIMEOUT_S)
    await wire.wait_for(lambda counters: counters.received >= sent + FRESH_FRAMES, deadline_s=TIMEOUT_S)
    crashes.back_after_s.append(time.monotonic() - killed_s)


@pytest.mark.slow
@pytest.mark.parametrize("rings", RINGS)
@pytest.mark.parametrize("keeper", WHO_KEEPS_THE_RECORD)
async def test_heads_that_were_used_in_another_order_than_taken_are_used_once(
    veth: Namespace, tmp_path: Path, keeper: str, rings: str
) -> None:
    """While the interface is down, copied frames are done and the others, between them, wait in the kernel."""
    frames = 100
    wire = PacketWire(veth.peer_ifindex)
    async with attached_port(veth, tmp_path / "port.sock") as port, wire:
        await port.until_said("is ready")
        async with BuiltinGuest.connect(tmp_path / "port.sock", config(keeper, rings), timeout_s=TIMEOUT_S) as guest:
            veth.run("ip", "link", "set", veth.ifname, "down")
            guest.start(source=Source(pattern=FROM_GUEST, count=frames), polling=True)
            await guest.wait_for(lambda counters: counters.tx_frames == frames // 2, deadline_s=TIMEOUT_S)
            worker = (await port.until(lambda report: report.guest == "running")).worker_pid
            assert worker is not None
            os.kill(worker, signal.SIGKILL)
            await until_gone(worker)
            veth.run("ip", "link", "set", veth.ifname, "up")

            await guest.reconnect(await Frontend.connect(tmp_path / "port.sock", timeout_s=TIMEOUT_S))

            await guest.wait_for(lambda counters: counters.tx_frames == frames, deadline_s=TIMEOUT_S)
            on_wire = await wire.wait_for(lambda counters: counters.received == frames // 2, deadline_s=TIMEOUT_S)
            await guest.stop()
            assert guest.violations() == {}
            assert (on_wire.check_good, on_wire.check_corrupt) == (frames // 2, 0)
            await port.until(lambda report: report.buffers_resumed == frames // 2 + QUEUE_SIZE)


async def crash_often(
    namespace: Namespace, path: Path, config: GuestConfig, kills: int, record_figure: RecordFigure
) -> list[float]:
    """Kill so many workers, and hold the guest's account against it. Returns how long each time traffic was away."""
    moments = random.Random(kills)
    crashes = Crashes()
    wire = PacketWire(namespace.peer_ifindex)
    async with attached_port(namespace, path) as port, wire:
        await port.until_said("is ready")
        async with BuiltinGuest.connect(path, config, timeout_s=TIMEOUT_S) as guest:
            guest.start(rx="check", source=Source(pattern=FROM_GUEST))
            wire.start_sending(TO_GUEST, count=ENDLESS)
            for kill in range(kills):
                started_s = time.monotonic()
                at = started_s + RESTART_AT_ONCE_S + moments.random() / 4
                await guest.wait_for(lambda _, at=at: time.monotonic() >= at)  # type: ignore[misc]
                await crash(port, path, guest, wire, crashes)
                assert guest.violations() == {}, f"after kill {kill + 1}"
            wire.stop_sending()
            guest.start(rx="check")
            await guest.stop()

            counters, on_wire = guest.counters(), wire.counters()
            assert guest.violations() == {}
            assert guest.driver.changed_gap_bytes() == 0
            # Not behind received frames: an earlier worker's socket may have written to a buffer that came back later.
            assert counters.tx_bytes_changed == 0
            assert (counters.check_corrupt, counters.check_duplicate, counters.check_foreign) == (0, 0, 0)
            assert on_wire.check_corrupt == 0
        report = await port.stop()
    assert report.worker_restarts == kills
    assert report.buffers_resumed > 0
    record_figure("kills", kills)
    record_figure("back_after_s_max", round(max(crashes.back_after_s), 3))
    record_figure("back_after_s_median", round(statistics.median(crashes.back_after_s), 3))
    record_figure("heads_taken_over", report.buffers_resumed)
    record_figure("frames_from_guest", on_wire.check_good)
    record_figure("frames_sent_twice", on_wire.check_duplicate)
    record_figure("frames_to_guest", counters.check_good)
    return crashes.back_after_s


@pytest.mark.slow
@pytest.mark.parametrize("rings", RINGS)
@pytest.mark.parametrize("keeper", WHO_KEEPS_THE_RECORD)
async def test_no_head_is_lost_or_used_twice_when_the_worker_is_killed(
    veth: Namespace, tmp_path: Path, keeper: str, rings: str, record_figure: RecordFigure
) -> None:
    # How long traffic was away is judged in the long form, with which nothing else runs on the machine.
    await crash_often(veth, tmp_path / "port.sock", config(keeper, rings), 5, record_figure)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rings", RINGS)
@pytest.mark.parametrize("keeper", WHO_KEEPS_THE_RECORD)
async def test_no_head_is_lost_or_used_twice_when_the_worker_is_killed_a_hundred_times(
    veth: Namespace, tmp_path: Path, keeper: str, rings: str, record_figure: RecordFigure
) -> None:
    back_after_s = await crash_often(veth, tmp_path / "port.sock", config(keeper, rings), 100, record_figure)
    assert max(back_after_s) < BACK_WITHIN_S
