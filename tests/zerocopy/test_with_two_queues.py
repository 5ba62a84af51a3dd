"""Two queue pairs in zero-copy mode share one UMEM: each has a pool, a teardown and a proof of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from zero_copy_port import GUEST_KINDS, SOME_SIZES, PortSlot

from mpassthru.testing.guest_config import Pattern, Source
from mpassthru.testing.netns import Namespace

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.long]

COUNT = 2000
ROUNDS = 5


async def test_both_queues_send_uncopied_and_stop_one_by_one(wire: Namespace, slot: PortSlot) -> None:
    if wire.ifname != "igb":
        pytest.skip("the other NIC has one queue")
    port = await slot.attach(wire, "--queues", "2")
    config = replace(GUEST_KINDS["linux-hash-report"], queue_pairs=2, canaries=False)
    async with port.stay(config) as stay:
        guest = stay.guest
        for _ in range(ROUNDS):
            guest.start(rx="check")
            await port.receive(guest, SOME_SIZES)  # no address of a higher layer: all on queue 0
            good = port.peer.counters().check_good
            pattern = Pattern(seed=port.new_seed(), sizes=(60, 1514))
            port.new_seed()  # of the second queue pair
            guest.start(rx="check", source=Source(pattern=pattern, count=COUNT, first_sequence=0))
            after = await port.peer.wait_for(lambda c, good=good: c.check_good >= good + 2 * COUNT, deadline_s=60)
            assert after.check_corrupt == after.check_missing == after.check_duplicate == 0
            await guest.stop()
            assert guest.violations() == {}
            await guest.start_device()
    assert stay.rx.direct == stay.rx.frames == ROUNDS * len(SOME_SIZES)
    assert stay.tx.direct == stay.tx.frames == ROUNDS * 2 * COUNT
