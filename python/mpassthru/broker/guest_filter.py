"""The filter of a port: which frames of its interface the guest gets.

What the options allow, and of that, where somebody says what the guest asks for (`--qmp`), only what it asks for.
Two are told: the NIC, what to receive (`address_filter`); and with `--steer mac` the steering program, which of it is
the guest's, the rest being the host's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from mpassthru.broker.address_filter import AddressFilter
from mpassthru.netdev import Interface, read_address
from mpassthru.steering import EVERYTHING, Filter


@dataclass(frozen=True, kw_only=True)
class Steer:
    """Which frames of a queue go to the guest."""

    kind: Literal["passthru", "mac"] = "passthru"
    allowed: Filter = EVERYTHING
    """With `mac`, the rest is the host's. With `passthru` the guest gets what arrives, and the NIC receives this."""


class Program(Protocol):
    """What a filter needs of `_core.SteeringProgram`."""

    def set_filter(self, filter: Filter) -> None:
        """Replace the filter at once."""


class GuestFilter:
    """Keeps NIC and program of one interface at a time at what the guest is to get.

    Args:
        steer: What the options allow.
    """

    def __init__(self, steer: Steer) -> None:
        self._steer = steer

    @contextmanager
    def applied_to(self, interface: Interface, program: Program | None) -> Iterator[None]:
        """Apply it to an interface until the end of the block.

        Args:
            interface: In the current network namespace.
            program: Of the interface; None if it has none.

        Raises:
            HostError: the kernel refused.
        """
        with AddressFilter(interface.name, interface.ifindex) as addresses:
            wanted = self._steer.allowed
            addresses.receive(wanted)
            if program is not None and self._steer.kind == "mac":
                program.set_filter(self._without_host(wanted, interface.ifindex))
            yield

    def _without_host(self, wanted: Filter, ifindex: int) -> Filter:
        """The filter with the host's own address, unless it was given to the guest by name."""
        host_address = read_address(ifindex)
        if host_address in (self._steer.allowed.unicast or ()):
            return wanted
        return msgspec.structs.replace(wanted, host_address=host_address)
