"""What two readings of an interface say about what happened in between."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mpassthru.netdev.link_events import (
    Appeared,
    CarrierChanged,
    LinkEvent,
    LinkState,
    Moved,
    MtuChanged,
    QueuesChanged,
    Removed,
    Renamed,
    SetUp,
    XdpProgramChanged,
    events_between,
)

LINK = LinkState(
    ifindex=3, name="eth1", up=True, carrier=True, mtu_bytes=1500, xdp_program_id=7, rx_queues=4, tx_queues=4
)


@pytest.mark.parametrize(
    ("after", "events"),
    [
        (LINK, []),
        (replace(LINK, name="eth2"), [Renamed("eth2")]),
        (replace(LINK, up=False, carrier=False), [SetUp(False), CarrierChanged(False)]),
        (replace(LINK, carrier=False), [CarrierChanged(False)]),
        (replace(LINK, mtu_bytes=9000), [MtuChanged(9000)]),
        (replace(LINK, xdp_program_id=8), [XdpProgramChanged(8)]),
        (replace(LINK, xdp_program_id=None), [XdpProgramChanged(None)]),
        (replace(LINK, rx_queues=1), [QueuesChanged(rx=1, tx=4)]),
        (replace(LINK, tx_queues=1), [QueuesChanged(rx=4, tx=1)]),
        (None, [Removed()]),
        (replace(LINK, ifindex=4), [Removed(), Appeared("eth1")]),
    ],
)
def test_each_change_is_one_event(after: LinkState | None, events: list[LinkEvent]) -> None:
    assert list(events_between(LINK, after)) == events


def test_an_interface_comes_with_its_name() -> None:
    assert list(events_between(None, LINK)) == [Appeared("eth1")]
    assert list(events_between(None, None)) == []


def test_an_interface_that_was_away_is_another_one_even_if_it_looks_the_same() -> None:
    assert list(events_between(LINK, LINK, departure=Moved())) == [Moved(), Appeared("eth1")]
    assert list(events_between(LINK, None, departure=Moved())) == [Moved()]
    assert list(events_between(None, LINK, departure=Moved())) == [Appeared("eth1")]
