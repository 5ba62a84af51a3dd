"""More frames than anybody could take, without a pause: what arrives is right, whatever is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from zero_copy_port import GUEST_KINDS, SOME_SIZES, PortSlot, ZeroCopyPort

from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.guest_config import GuestCounters, Pattern

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

NO_END = 100_000_000
DEADLINE_S = 120
GUEST = replace(GUEST_KINDS["linux-hash-report"], canaries=False)


def wrong(counters: GuestCounters) -> int:
    return counters.check_corrupt + counters.check_foreign + counters.check_duplicate


async def flooded(port: ZeroCopyPort, guest: BuiltinGuest, frames: int) -> GuestCounters:
    """The guest's counters after it has received so many more frames of a flood that goes on."""
    goal = guest.counters().rx_frames + frames
    return await guest.wait_for(lambda c: c.rx_frames >= goal, deadline_s=DEADLINE_S)


def start_flood(port: ZeroCopyPort) -> None:
    port.peer.start_sending(Pattern(seed=port.new_seed(), sizes=(1514, 60)), count=NO_END)


async def stop_flood(port: ZeroCopyPort) -> None:
    port.peer.stop_sending()
    await port.peer.sending_ended()


@pytest.mark.parametrize("frames", [3_000, pytest.param(60_000, marks=pytest.mark.long)])
async def test_what_virtio_net_brings_under_a_flood_is_right(
    port: ZeroCopyPort, frames: int, record_figure: Callable[[str, object], None]
) -> None:
    if port.ifname != "virtio":
        pytest.skip("the other driver is tested below")
    async with port.stay(GUEST) as stay:
        stay.guest.start(rx="check")
        start_flood(port)
        try:
            counters = await flooded(port, stay.guest, frames)
        finally:
            await stop_flood(port)
        assert wrong(counters) == 0, counters
    assert stay.rx.direct == stay.rx.frames
    record_figure(f"{port.ifname}.flood_frames", stay.rx.frames)

    async with port.stay(GUEST) as stay:
        stay.guest.start(rx="check")
        await port.receive(stay.guest, SOME_SIZES)


@pytest.mark.parametrize("frames", [3_000, pytest.param(60_000, marks=pytest.mark.long)])
async def test_port_leaves_zero_copy_at_the_first_wrong_answer_of_igb_and_brings_nothing_wrong_from_then_on(
    port: ZeroCopyPort, slot: PortSlot, frames: int, record_figure: Callable[[str, object], None]
) -> None:
    if port.ifname != "igb":
        pytest.skip("nothing that the other driver answers is wrong")
    async with port.stay(GUEST) as stay:
        stay.guest.start(rx="check")
        start_flood(port)
        try:
            said = await port.attached.until_said("going on in copy mode", timeout_s=DEADLINE_S)
            seen = stay.guest.counters()
            await port.attached.until(lambda report: report.mode == "copy", timeout_s=DEADLINE_S)
            counters = await flooded(port, stay.guest, frames)
        finally:
            await stop_flood(port)
        assert "suspect its driver, igb of igb" in said
        assert wrong(counters) == wrong(seen), (seen, counters)
    assert stay.rx.dropped["unknown_answer"] == 1
    record_figure(f"{port.ifname}.frames_before_the_first_answer_known_to_be_wrong", seen.rx_frames)
    record_figure(f"{port.ifname}.frames_wrong_before_it", wrong(seen))

    # The next guest on this port is in copy mode too, and is served.
    async with port.stay(GUEST) as stay:
        stay.guest.start(rx="check")
        await port.receive(stay.guest, SOME_SIZES)
    assert port.attached.report is not None
    await slot.leave()
