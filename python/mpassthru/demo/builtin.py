"""The demo without a VM: patterned frames both ways at once, each checked byte for byte where it arrives."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Final

from mpassthru.demo.report import Check, DemoReport, port_checks
from mpassthru.demo.scene import scene
from mpassthru.live_view import View
from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import GuestConfig, GuestCounters, Pattern, Source
from mpassthru.testing.wire import PacketWire, WireCounters

SECONDS: Final = 5.0
FRAME_SIZES: Final = (60, 590, 1514)
TX_RATE_FRAMES_PER_S: Final = 150_000.0
"""So that the wire's receiver, a packet socket, need not drop what it is to check."""
QUEUE_SIZE: Final = 1024
RX_PORTION_FRAMES: Final = 384
"""On their way at once: fewer than the queue and the kernel's rings hold, so that none is lost for want of room."""
RX_BATCH_FRAMES: Final = 16 * RX_PORTION_FRAMES
TO_GUEST: Final = Pattern(seed=1, sizes=FRAME_SIZES)
FROM_GUEST: Final = Pattern(seed=2, sizes=FRAME_SIZES)
SETTLE_TIMEOUT_S: Final = 5.0


async def run_builtin(view: View, *, seconds: float = SECONDS, interval_s: float = 0.5) -> DemoReport:
    """Run the demo.

    Args:
        view: Shows what goes on.
        seconds: How long traffic flows.
        interval_s: Seconds between figures.

    Raises:
        HostError: the kernel or this process cannot do it; see `mpassthru doctor`.
        MpassthruError: the port or the guest failed.
        TimeoutError: frames did not arrive.
    """
    started_s = time.monotonic()
    async with scene(view, interval_s=interval_s) as stage:
        with stage.namespace.entered():
            wire = PacketWire(stage.namespace.peer_ifindex)
        async with wire, BuiltinGuest.connect(stage.socket_path, GuestConfig(queue_size=QUEUE_SIZE)) as guest:
            await stage.port.until(lambda report: report.guest == "running")
            await _exchange(guest, wire, seconds)
            counted, on_wire, violations = guest.counters(), wire.counters(), guest.violations()
            figures = await stage.port.until(
                lambda report: report.rx.frames >= on_wire.sent and report.tx.frames >= counted.tx_frames
            )
        await stage.port.until(lambda report: report.guest == "waiting")
        final = await stage.port.stop()
    checks = (*_traffic_checks(counted, on_wire, violations), *port_checks(final))
    return DemoReport(
        mode=final.mode,
        rx=final.rx,
        tx=final.tx,
        ok=all(check.ok for check in checks),
        guest="builtin",
        seconds=round(time.monotonic() - started_s, 2),
        kernel=os.uname().release,
        xdp_mode=figures.xdp_mode,
        checks=checks,
        traffic={"seconds": seconds, "guest": asdict(counted), "wire": asdict(on_wire)},
    )


async def _exchange(guest: BuiltinGuest, wire: PacketWire, seconds: float) -> None:
    """Send both ways for a time, then wait until everything has arrived."""
    guest.start(rx="check", source=Source(pattern=FROM_GUEST, rate_frames_per_s=TX_RATE_FRAMES_PER_S))
    deadline = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < deadline:
        await wire.send_in_portions(
            TO_GUEST,
            count=RX_BATCH_FRAMES,
            arrived=lambda: guest.counters().rx_frames,
            portion=RX_PORTION_FRAMES,
        )
    guest.start(rx="check")
    await guest.wait_for(lambda counters: counters.tx_frames == counters.tx_posted, deadline_s=SETTLE_TIMEOUT_S)
    sent = guest.counters().tx_frames
    await wire.wait_for(lambda counters: counters.received + counters.kernel_drops >= sent, deadline_s=SETTLE_TIMEOUT_S)


def _traffic_checks(guest: GuestCounters, wire: WireCounters, violations: dict[str, int]) -> Iterator[Check]:
    yield Check(
        name="every frame reached the guest intact",
        ok=guest.check_good == wire.sent > 0 and not (guest.check_corrupt or guest.check_duplicate),
        found=f"{guest.check_good:,} of {wire.sent:,}, {guest.check_corrupt} corrupt",
    )
    yield Check(
        name="every frame of the guest reached the wire intact",
        ok=wire.check_good + wire.kernel_drops == guest.tx_frames > 0
        and not (wire.check_corrupt or wire.check_duplicate),
        found=f"{wire.check_good:,} of {guest.tx_frames:,}, {wire.check_corrupt} corrupt"
        + (f", {wire.kernel_drops} unchecked for want of room in the checker" if wire.kernel_drops else ""),
    )
    yield Check(
        name="virtqueue rules kept",
        ok=not violations,
        found=", ".join(f"{name}: {count}" for name, count in violations.items()) or "no violation",
    )
