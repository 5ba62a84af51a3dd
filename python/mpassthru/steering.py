"""Which frames are the guest's where its queues are shared with the host, as broker and steering program pass it on."""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

TABLE_MAX: Final = 64
"""Addresses of a kind that the steering program has room for (`crates/steering`)."""
VLAN_MAX: Final = 4094
"""The last VLAN; 4095 is reserved (IEEE 802.1Q 9.6)."""

_Entry = TypeVar("_Entry", bytes, int)


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Frames of these VLANs that are sent to these addresses. None stands for all that there are."""

    unicast: tuple[bytes, ...] | None
    """Station addresses."""
    multicast: tuple[bytes, ...] | None
    """Group addresses, but for broadcast."""
    broadcast: bool
    vlans: tuple[int, ...] | None
    """VLANs of tagged frames (IEEE 802.1Q). Frames without a tag, or with one of VLAN 0, are in none, and pass."""
    host_address: bytes | None = None
    """Frames to this station are the host's, whatever `unicast` says."""

    def within(self, allowed: Filter) -> Filter:
        """What is in this one and in `allowed`; the host's address is that of `allowed`."""
        return Filter(
            unicast=_common(self.unicast, allowed.unicast),
            multicast=_common(self.multicast, allowed.multicast),
            broadcast=self.broadcast and allowed.broadcast,
            vlans=_common(self.vlans, allowed.vlans),
            host_address=allowed.host_address,
        )

    def __str__(self) -> str:
        """For people: `2 addresses, broadcast, all multicast, VLANs 5, 7`."""
        stations = "all addresses" if self.unicast is None else _count(len(self.unicast), "address", "addresses")
        groups = "all multicast" if self.multicast is None else _count(len(self.multicast), "group", "groups")
        vlans = "all VLANs" if self.vlans is None else f"VLANs {_ranges(self.vlans)}" if self.vlans else "no VLAN"
        return ", ".join((stations, *["broadcast"] * self.broadcast, groups, vlans))


EVERYTHING: Final = Filter(unicast=None, multicast=None, broadcast=True, vlans=None)
NOTHING: Final = Filter(unicast=(), multicast=(), broadcast=False, vlans=())


def _common(asked: tuple[_Entry, ...] | None, allowed: tuple[_Entry, ...] | None) -> tuple[_Entry, ...] | None:
    if asked is None:
        return allowed
    return asked if allowed is None else tuple(entry for entry in asked if entry in frozenset(allowed))


def _count(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _ranges(numbers: tuple[int, ...]) -> str:
    """Numbers as `5, 7-9`."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    return ", ".join("-".join(map(str, ends)) for ends in ranges)
