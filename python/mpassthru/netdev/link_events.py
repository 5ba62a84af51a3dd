"""What happens to an interface, as data: its state at a moment, and the events that lead from one to the next.

Events are differences of two readings, not the content of notifications: those get lost (netlink(7), ENOBUFS), come
late, and for some things do not come at all. What changed and changed back in between is no event, but for one thing:
an interface that was away is never the same again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinkState:
    """An interface at the moment it was read; what a port on it depends on."""

    ifindex: int
    name: str
    up: bool
    """Administratively (IFF_UP)."""
    carrier: bool
    """IFF_LOWER_UP."""
    mtu_bytes: int
    xdp_program_id: int | None
    rx_queues: int
    tx_queues: int


@dataclass(frozen=True, slots=True)
class Appeared:
    """There is an interface where there was none."""

    name: str


@dataclass(frozen=True, slots=True)
class Removed:
    """The interface is gone; in this network namespace at least."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The interface went to another network namespace."""


@dataclass(frozen=True, slots=True)
class Renamed:
    """The interface has another name."""

    name: str


@dataclass(frozen=True, slots=True)
class SetUp:
    """The interface was set up or down (`ip link set up`)."""

    up: bool


@dataclass(frozen=True, slots=True)
class CarrierChanged:
    """The interface got or lost its carrier."""

    carrier: bool


@dataclass(frozen=True, slots=True)
class MtuChanged:
    """The interface has another MTU."""

    mtu_bytes: int


@dataclass(frozen=True, slots=True)
class XdpProgramChanged:
    """Another XDP program is attached, or none."""

    program_id: int | None


@dataclass(frozen=True, slots=True)
class QueuesChanged:
    """The interface has another number of queues in use."""

    rx: int
    tx: int


@dataclass(frozen=True, slots=True)
class NotificationsLost:
    """The interface may have been away and have come back; what else happened shows."""


LinkEvent = (
    Appeared
    | Removed
    | Moved
    | Renamed
    | SetUp
    | CarrierChanged
    | MtuChanged
    | XdpProgramChanged
    | QueuesChanged
    | NotificationsLost
)


def events_between(
    before: LinkState | None, after: LinkState | None, *, departure: Removed | Moved | None = None
) -> Iterator[LinkEvent]:
    """What happened between two readings, None being no interface. An interface is the same if its index is.

    Args:
        before: The earlier one.
        after: The later one.
        departure: What a notification said of the earlier interface in between. It may be back, with the same index,
            but whatever was bound to it is not.
    """
    if before is not None and (departure or after is None or after.ifindex != before.ifindex):
        yield departure or Removed()
        before = None
    if after is None:
        return
    if before is None:
        yield Appeared(after.name)
        return
    if after.name != before.name:
        yield Renamed(after.name)
    if after.up != before.up:
        yield SetUp(after.up)
    if after.carrier != before.carrier:
        yield CarrierChanged(after.carrier)
    if after.mtu_bytes != before.mtu_bytes:
        yield MtuChanged(after.mtu_bytes)
    if after.xdp_program_id != before.xdp_program_id:
        yield XdpProgramChanged(after.xdp_program_id)
    if (after.rx_queues, after.tx_queues) != (before.rx_queues, before.tx_queues):
        yield QueuesChanged(after.rx_queues, after.tx_queues)
