"""Filters: what is common to two, and how people read one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpassthru.steering import EVERYTHING, NOTHING, Filter

STATIONS = [bytes([2, 0, 0, 0, 0, last]) for last in range(4)]
GROUPS = [bytes([1, 0, 0x5E, 0, 0, last]) for last in range(4)]
VLANS = [0, 5, 6, 4094]


def tables(entries: Sequence[bytes] | Sequence[int]) -> st.SearchStrategy[tuple[bytes | int, ...] | None]:
    return st.none() | st.lists(st.sampled_from(entries), unique=True).map(tuple)


FILTERS = st.builds(
    Filter, unicast=tables(STATIONS), multicast=tables(GROUPS), broadcast=st.booleans(), vlans=tables(VLANS)
)


@given(FILTERS, FILTERS)
def test_within_has_what_both_have_and_nothing_else(asked: Filter, allowed: Filter) -> None:
    both = asked.within(allowed)

    for name, entries in (("unicast", STATIONS), ("multicast", GROUPS), ("vlans", VLANS)):
        tables = [getattr(one, name) for one in (both, asked, allowed)]
        for entry in entries:
            common, *separate = (table is None or entry in table for table in tables)
            assert common == all(separate)
        assert (tables[0] is None) == (tables[1] is None and tables[2] is None)
    assert both.broadcast == (asked.broadcast and allowed.broadcast)


def test_host_address_is_not_what_is_asked_for() -> None:
    allowed = Filter(unicast=None, multicast=None, broadcast=True, vlans=None, host_address=STATIONS[0])
    asked = Filter(unicast=None, multicast=None, broadcast=True, vlans=None, host_address=STATIONS[1])

    assert asked.within(allowed).host_address == STATIONS[0]
    assert EVERYTHING.within(allowed).host_address == STATIONS[0]


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (EVERYTHING, "all addresses, broadcast, all multicast, all VLANs"),
        (NOTHING, "0 addresses, 0 groups, no VLAN"),
        (
            Filter(unicast=(STATIONS[0],), multicast=(GROUPS[0],), broadcast=True, vlans=(9, 5, 7, 8)),
            "1 address, broadcast, 1 group, VLANs 5, 7-9",
        ),
    ],
)
def test_filter_is_said_in_a_line(shown: Filter, text: str) -> None:
    assert str(shown) == text
