"""The operator's promise that no longer frame arrives: what it is good for, and what happens when it is broken.

The second half proves the canaries of the other tests, too: a frame that nothing holds back does change them.
"""

from __future__ import annotations

import pytest
import pytest_asyncio
from zero_copy_port import GUEST_KINDS, SOME_SIZES, PortSlot, ZeroCopyPort

from mpassthru.testing.guest import BuiltinGuest
from mpassthru.testing.netns import Namespace

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.long]

PROMISED_BYTES = 1518
BROKEN_PROMISE = b"\xff" * 6 + b"\x02\0\0\0\0\x01\x88\xb6" + b"B" * (1530 - 14)
"""With its FCS no longer than igb lets pass (1536), and longer than was promised."""


@pytest_asyncio.fixture(loop_scope="session")
async def promised(wire: Namespace, slot: PortSlot) -> ZeroCopyPort:
    return await slot.attach(wire, "--max-frame", str(PROMISED_BYTES))


async def test_ordinary_linux_guests_go_direct(promised: ZeroCopyPort) -> None:
    for kind in ("linux-default", "linux-not-mergeable"):
        async with promised.stay(GUEST_KINDS[kind]) as stay:
            stay.guest.start(rx="check")
            await promised.receive(stay.guest, SOME_SIZES)
            assert stay.guest.check_canaries() == 0
        assert stay.rx.direct == len(SOME_SIZES)


async def test_broken_promise_overwrites_what_follows_a_buffer(promised: ZeroCopyPort) -> None:
    # 12 + 1518 bytes in steps of 2048, so that canaries follow and not the next buffer
    async with BuiltinGuest.connect(promised.socket_path, GUEST_KINDS["linux-not-mergeable"], timeout_s=30) as guest:
        guest.start(rx="sink")
        await guest.wait_for(lambda c: guest.driver.ring(0).avail_idx > 0)
        promised.peer.send_frame(BROKEN_PROMISE)
        await guest.wait_for(lambda _: guest.driver.changed_gap_bytes() > 0, deadline_s=10)
        assert guest.driver.changed_gap_bytes() == len(BROKEN_PROMISE) - PROMISED_BYTES
        await guest.stop()
