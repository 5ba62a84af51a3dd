"""Guest memory on huge pages, 4 KiB pages, and both: what is one range for a NIC goes direct, all else bounces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from zero_copy_port import HASH_REPORT, HUGE, SOME_SIZES, ZeroCopyPort

from mpassthru.testing.guest_config import BufferLayout, GuestConfig, Region

pytestmark = pytest.mark.asyncio(loop_scope="session")

FULL_SIZE = (1514,)
FULL_SIZE_FRAMES = 2000
SMALL_PAGES = Region(size_bytes=16 << 20)
ABOVE_4_GIB = 0x1_0000_0000
RX = BufferLayout(pieces=(1600,))
TX_CROSSING = BufferLayout(pieces=(20 + 1514,), stride_bytes=1700)
"""Of each page's frames some lie within it and some across its end."""

GUESTS = {
    "huge": GuestConfig(regions=(HUGE,), rx=RX, tx=TX_CROSSING),
    "small": GuestConfig(regions=(SMALL_PAGES,), rx=RX, tx=TX_CROSSING),
    "rx-huge-tx-small": GuestConfig(
        regions=(SMALL_PAGES, replace(HUGE, guest_phys_address=ABOVE_4_GIB)),
        rx=replace(RX, region=1),
        tx=TX_CROSSING,
    ),
    "rx-small-tx-huge": GuestConfig(
        regions=(HUGE, replace(SMALL_PAGES, guest_phys_address=ABOVE_4_GIB)),
        rx=replace(RX, region=1),
        tx=TX_CROSSING,
    ),
}
HUGE_RX = {"huge", "rx-huge-tx-small"}
HUGE_TX = {"huge", "rx-small-tx-huge"}


@pytest.mark.parametrize("memory", GUESTS)
async def test_what_is_not_one_range_for_the_nic_bounces_and_says_so(
    port: ZeroCopyPort, memory: str, record_figure: Callable[[str, object], None]
) -> None:
    async with port.stay(replace(GUESTS[memory], features=HASH_REPORT, canaries=True)) as stay:
        stay.guest.start(rx="check")
        await port.receive(stay.guest, SOME_SIZES)
        await port.receive(stay.guest, FULL_SIZE, FULL_SIZE_FRAMES)
        await port.send(stay.guest, FULL_SIZE, FULL_SIZE_FRAMES)
        assert stay.guest.check_canaries() == 0
    rx_share, tx_share = (direction.direct / direction.frames for direction in (stay.rx, stay.tx))
    record_figure(f"{port.ifname}.{memory}.rx_direct_share", rx_share)
    record_figure(f"{port.ifname}.{memory}.tx_direct_share", tx_share)
    assert stay.rx.bounced.keys() <= {"not_contiguous"} | port.may_bounce
    assert stay.tx.bounced.keys() <= {"not_contiguous"}
    if memory in HUGE_RX:
        assert rx_share >= 0.95
    else:
        # A fill entry takes 4096 bytes and a frame's is never page aligned: none lies in one page.
        assert rx_share == 0
    if memory in HUGE_TX:
        assert tx_share == 1
    else:
        assert 0 < tx_share < 1
