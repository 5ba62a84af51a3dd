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
from mpassthru.steering import EVERYTHING, NOTHING, Filter


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
    """Keeps NIC and program of a port's interface at what the guest is to get; of two while the port moves.

    Args:
        steer: What the options allow.
        follows: Somebody will say what the guest asks for; until then it gets what was given to it by address alone.
    """

    def __init__(self, steer: Steer, *, follows: bool = False) -> None:
        self._steer = steer
        unknown = follows and steer.kind == "mac" and steer.allowed.unicast is None
        self._interfaces: list[_Interface] = []
        self.in_force = NOTHING if unknown else steer.allowed
        """What the guest gets, or will get on an interface."""

    def ask(self, asked: Filter) -> None:
        """The guest asks for this: let it have what of it is allowed, from now on.

        Raises:
            HostError: the kernel refused; asking again tries again.
        """
        self.in_force = asked.within(self._steer.allowed)
        for interface in self._interfaces:
            interface.apply(self.in_force, host_address=self._host_address(interface.ifindex))

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
            applied = _Interface(interface.ifindex, addresses, program if self._steer.kind == "mac" else None)
            applied.apply(self.in_force, host_address=self._host_address(interface.ifindex))
            self._interfaces.append(applied)
            try:
                yield
            finally:
                self._interfaces.remove(applied)

    def _host_address(self, ifindex: int) -> bytes | None:
        """The host's own address, which no guest gets by asking; only by being given it by name."""
        address = read_address(ifindex)
        return None if address in (self._steer.allowed.unicast or ()) else address


class _Interface:
    """What is applied to one interface, and how."""

    def __init__(self, ifindex: int, addresses: AddressFilter, program: Program | None) -> None:
        self.ifindex = ifindex
        self._addresses = addresses
        self._program = program
        self._applied: Filter | None = None

    def apply(self, wanted: Filter, *, host_address: bytes | None) -> None:
        wanted = msgspec.structs.replace(wanted, host_address=host_address)
        if wanted == self._applied:
            return
        self._addresses.receive(wanted)
        if self._program is not None:
            self._program.set_filter(wanted)
        self._applied = wanted
