"""A driver that answers with a buffer which it does not have: zero-copy mode ends there, and the guest goes on."""

from __future__ import annotations

import pytest
from zero_copy_port import GUEST_KINDS, SOME_SIZES, PortSlot, ZeroCopyPort

from mpassthru.testing.guest_config import Pattern
from mpassthru.testing.xsk import answering_twice

pytestmark = pytest.mark.asyncio(loop_scope="session")

FRAMES = 5
AFTERWARDS = 100
RX_RING_DESCS = {"virtio": 1024, "igb": 64}
TIMEOUT_S = 60


async def test_guest_goes_on_in_copy_mode_and_gets_nothing_wrong(port: ZeroCopyPort, slot: PortSlot) -> None:
    try:
        await go_wrong(port)
    finally:
        # The port stays in copy mode as long as its worker lives.
        await slot.leave()


async def go_wrong(port: ZeroCopyPort) -> None:
    async with port.stay(GUEST_KINDS["linux-hash-report"], mode="copy") as stay:
        guest = stay.guest
        guest.start(rx="check")
        await port.receive(guest, SOME_SIZES)
        await port.send(guest, SOME_SIZES)
        pid = (await port.attached.until(lambda report: report.mode == "zero-copy")).worker_pid
        assert pid is not None
        async with answering_twice(pid, frames=FRAMES, ring_descs=RX_RING_DESCS[port.ifname]):
            await port.peer.send(Pattern(seed=port.new_seed(), sizes=(1514,)), count=FRAMES)
        said = await port.attached.until_said("going on in copy mode", timeout_s=TIMEOUT_S)
        await port.attached.until(lambda report: report.mode == "copy", timeout_s=TIMEOUT_S)
        assert guest.counters().rx_frames == len(SOME_SIZES) + 1, "nothing after the first wrong answer"
        good = guest.counters().check_good + AFTERWARDS
        pattern = Pattern(seed=port.new_seed(), sizes=SOME_SIZES)
        await port.peer.send_in_portions(pattern, count=AFTERWARDS, arrived=lambda: guest.counters().rx_frames)
        counters = guest.counters()
        assert (counters.check_good, counters.check_corrupt, counters.check_duplicate) == (good, 0, 0), counters
        assert guest.driver.changed_gap_bytes() == 0
    assert f" of {port.ifname}" in said
    assert stay.rx.dropped["unknown_answer"] == 1

    async with port.stay(GUEST_KINDS["linux-hash-report"], mode="copy") as stay:
        stay.guest.start(rx="check")
        await port.receive(stay.guest, SOME_SIZES)
        await port.send(stay.guest, SOME_SIZES)
        assert stay.guest.check_canaries() == 0
