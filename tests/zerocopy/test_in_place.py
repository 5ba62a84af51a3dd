"""Zero-copy mode on real drivers: frames of every size land in the guest's buffers, and leave from them, uncopied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from zero_copy_port import FRAME_SIZES, GUEST_KINDS, SOME_SIZES, ZeroCopyPort

pytestmark = pytest.mark.asyncio(loop_scope="session")

DIRECT_KINDS = ("linux-hash-report", "dpdk", "dpdk-not-mergeable")
BOUNCING_KINDS = ("linux-default", "linux-not-mergeable")


@pytest.mark.parametrize("kind", DIRECT_KINDS)
@pytest.mark.parametrize(
    "sizes", [SOME_SIZES, pytest.param(FRAME_SIZES, marks=pytest.mark.long)], ids=["some", "every"]
)
async def test_frames_of_these_sizes_are_placed_and_sent_without_a_copy(
    port: ZeroCopyPort, kind: str, sizes: tuple[int, ...], record_figure: Callable[[str, object], None]
) -> None:
    async with port.stay(GUEST_KINDS[kind]) as stay:
        stay.guest.start(rx="check")
        await port.receive(stay.guest, sizes)
        await port.send(stay.guest, sizes)
        assert stay.guest.check_canaries() == 0
    assert port.attached.report is not None
    assert (stay.rx.direct, stay.rx.bounced, stay.rx.copied_bytes) == (len(sizes), {}, 0)
    assert (stay.tx.direct, stay.tx.bounced, stay.tx.copied_bytes) == (len(sizes), {}, 0)
    assert stay.rx.bytes == stay.tx.bytes == sum(sizes)
    record_figure(f"{port.ifname}.{kind}.rx_direct_share", stay.rx.direct / stay.rx.frames)
    record_figure(f"{port.ifname}.{kind}.tx_direct_share", stay.tx.direct / stay.tx.frames)


@pytest.mark.parametrize("kind", BOUNCING_KINDS)
async def test_buffers_that_a_nic_could_overrun_are_not_given_to_it(
    port: ZeroCopyPort, kind: str, record_figure: Callable[[str, object], None]
) -> None:
    async with port.stay(GUEST_KINDS[kind]) as stay:
        stay.guest.start(rx="check")
        await port.receive(stay.guest, SOME_SIZES)
        assert stay.guest.check_canaries() == 0
    assert (stay.rx.direct, stay.rx.bounced) == (0, {"short_buffer": len(SOME_SIZES)})
    assert stay.rx.copied_bytes == sum(SOME_SIZES)
    record_figure(f"{port.ifname}.{kind}.rx_direct_share", stay.rx.direct / stay.rx.frames)
