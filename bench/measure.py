"""One load on one back-end: a sample."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bench.backends import Backend
from bench.cpu import CpuTime, cpu_time
from bench.load import Load, Plan
from bench.results import Sample
from bench.wire import Wire, still


@dataclass(frozen=True, slots=True)
class _Look:
    """All figures at one moment."""

    at_s: float
    received: int
    arrived: int
    cpu: CpuTime


@dataclass(frozen=True, slots=True)
class _Losses:
    """Figures that are exact only while nothing moves."""

    received: int
    handed_over: int
    arrived: int
    by_reason: dict[str, int]


async def measure(plan: Plan, load: Load, backend: Backend, wire: Wire, *, peer: str, round_: int) -> Sample:
    """Apply a load and measure.

    Rates and CPU time are those of `plan.seconds` in the middle; what was lost is counted from the first frame to the
    last, with everything at rest before and after.

    Raises:
        TimeoutError: frames go on moving after the load has ended.
    """
    before = await _at_rest(backend, wire)
    async with _applied(load, backend, wire) as sent_by_wire:
        await asyncio.sleep(plan.warm_up_s)
        start = await _look(backend, wire)
        await asyncio.sleep(plan.seconds)
        end = await _look(backend, wire)
    after = await _at_rest(backend, wire)
    offered = sent_by_wire() + after.handed_over - before.handed_over
    delivered = _moved(load, before, after)
    return Sample(
        peer=peer,
        round=round_,
        load=load,
        seconds=end.at_s - start.at_s,
        frames=_moved(load, start, end),
        backend_user_s=end.cpu.user_s - start.cpu.user_s,
        backend_system_s=end.cpu.system_s - start.cpu.system_s,
        backend_s=end.cpu.total_s - start.cpu.total_s,
        machine_s=end.cpu.machine_s - start.cpu.machine_s,
        offered=offered,
        delivered=delivered,
        lost={
            reason: count - before.by_reason.get(reason, 0)
            for reason, count in after.by_reason.items()
            if count > before.by_reason.get(reason, 0)
        },
    )


@asynccontextmanager
async def _applied(load: Load, backend: Backend, wire: Wire) -> AsyncIterator[Callable[[], int]]:
    """Have the wire, the guest, or both send; yields the count of what the wire has sent."""
    if load.direction != "rx":
        await backend.start_sending(load.frame_bytes, load.rate_frames_per_s)
    try:
        if load.direction == "tx":
            yield lambda: 0
        else:
            async with wire.sending(load) as sent:
                yield sent
    finally:
        if load.direction != "rx":
            await backend.stop_sending()


async def _look(backend: Backend, wire: Wire) -> _Look:
    received = await backend.received()
    return _Look(time.monotonic(), received, wire.arrived, cpu_time(backend.pid))


async def _at_rest(backend: Backend, wire: Wire) -> _Losses:
    await still(lambda: wire.arrived)
    by_reason = await backend.dropped() | {"rx: veth_ring_full": wire.lost_on_the_pair()}
    return _Losses(await backend.received(), await backend.sent(), wire.arrived, by_reason)


def _moved(load: Load, before: _Look | _Losses, after: _Look | _Losses) -> int:
    """Frames that reached their end, in the directions of the load."""
    received = after.received - before.received if load.direction != "tx" else 0
    arrived = after.arrived - before.arrived if load.direction != "rx" else 0
    return received + arrived
