"""Rx offloads are offered where each frame is copied anyway, or where they were asked for."""

from __future__ import annotations

import msgspec
import pytest

from mpassthru.broker.rx_offloads import RxOffloads, offers_rx_offloads
from mpassthru.errors import RefusedError
from mpassthru.rules import ZeroCopyRules

DIRECT = ZeroCopyRules(
    frame_room_bytes=1536,
    direct=True,
    rx_write_max_bytes=1536,
    rx_write_align_bytes=1,
    rx_write_before_bytes=0,
    tx_frame_max_bytes=1518,
    tx_frame_min_bytes=60,
    tx_pieces_max=1,
    contiguity="backing-page",
)
BOUNCE_ONLY = msgspec.structs.replace(DIRECT, direct=False)


def test_auto_offers_them_only_where_no_frame_stays_in_place() -> None:
    assert offers_rx_offloads("auto", "zero-copy", BOUNCE_ONLY)
    assert not offers_rx_offloads("auto", "zero-copy", DIRECT)
    assert not offers_rx_offloads("auto", "copy", None)


@pytest.mark.parametrize("choice", ["on", "off"])
def test_choice_of_the_user_is_taken(choice: RxOffloads) -> None:
    assert offers_rx_offloads(choice, "copy", None) == (choice == "on")
    assert offers_rx_offloads(choice, "zero-copy", BOUNCE_ONLY) == (choice == "on")


def test_mode_packet_has_none() -> None:
    assert not offers_rx_offloads("auto", "packet", None)
    with pytest.raises(RefusedError, match="--rx-offloads"):
        offers_rx_offloads("on", "packet", None)
