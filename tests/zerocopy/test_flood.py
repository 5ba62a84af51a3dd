"""More frames than anybody could take, without a pause: what arrives is right, whatever is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from zero_copy_port import GUEST_KINDS, SOME_SIZES, ZeroCopyPort

from mpassthru.testing.guest_config import Pattern

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

NO_END = 100_000_000
DEADLINE_S = 120
GUEST = replace(GUEST_KINDS["linux-hash-report"], canaries=False)


@pytest.mark.parametrize("frames", [3_000, pytest.param(50_000, marks=pytest.mark.long)])
async def test_what_arrives_under_a_flood_is_right(
    port: ZeroCopyPort, frames: int, record_figure: Callable[[str, object], None]
) -> None:
    async with port.stay(GUEST) as stay:
        guest = stay.guest
        guest.start(rx="check")
        port.peer.start_sending(Pattern(seed=port.new_seed(), sizes=(1514, 60)), count=NO_END)
        try:
            counters = await guest.wait_for(lambda c: c.rx_frames >= frames, deadline_s=DEADLINE_S)
        finally:
            port.peer.stop_sending()
            await port.peer.sending_ended()
        assert (counters.check_corrupt, counters.check_foreign, counters.check_duplicate) == (0, 0, 0), counters
    assert port.attached.report is not None
    assert port.attached.report.troubles == ()
    assert stay.rx.bounced.keys() <= port.may_bounce
    record_figure(f"{port.ifname}.flood_frames", stay.rx.frames)
    record_figure(f"{port.ifname}.flood_direct_share", stay.rx.direct / stay.rx.frames)

    async with port.stay(GUEST) as stay:
        stay.guest.start(rx="check")
        await port.receive(stay.guest, SOME_SIZES)
    assert stay.rx.dropped == {}
